//! Copying pages of guest RAM into the arena, by several threads where it pays.
//!
//! The cut calls it with the guest stopped, [`crate::session`] also with the guest running: a page that is written meanwhile
//! gives a copy that is torn, never an invalid access; whether it counts is decided elsewhere.

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use understudy_protocol::urgent;

use crate::memory::{PAGE, Ram};

/// Fewer pages than this are not worth waking other threads.
const WORTH_SHARING: usize = 512;
/// Pages that a thread takes at once.
const SHARE: usize = 128;
/// More threads than this only wait for memory.
const MOST_THREADS: usize = 4;

/// The threads.
pub struct Gather {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Gather {
    /// As many threads as this host has processors, at most four.
    pub fn new() -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let pool = (threads > 1)
            .then(|| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("gather{i}"));
                pool.start_handler(|_| urgent::brisk()).build()
            })
            .transpose()
            .context("cannot start the threads that copy pages")?;
        Ok(Self { pool, threads })
    }

    /// How many threads copy `pages` pages.
    pub fn threads_for(&self, pages: u64) -> usize {
        if pages < WORTH_SHARING as u64 { 1 } else { self.threads }
    }

    /// Copy the pages with these indices to `to`, one behind the other.
    pub fn copy(&self, ram: &Ram, pages: &[u64], to: &mut [u8]) -> Result<()> {
        ensure!(to.len() >= pages.len() * PAGE, "the arena is too small for {} pages", pages.len());
        match &self.pool {
            Some(pool) if pages.len() >= WORTH_SHARING => {
                // Who helps is as urgent as whoever waits for it.
                let urgent = urgent::is_urgent();
                pool.install(|| {
                    let slots = to.par_chunks_mut(SHARE * PAGE);
                    pages.par_chunks(SHARE).zip(slots).try_for_each(|(pages, slots)| {
                        let _held = urgent.then(urgent::hold);
                        copy_some(ram, pages, slots)
                    })
                })
            }
            _ => copy_some(ram, pages, to),
        }
    }
}

fn copy_some(ram: &Ram, pages: &[u64], to: &mut [u8]) -> Result<()> {
    for (index, slot) in pages.iter().zip(to.chunks_exact_mut(PAGE)) {
        let page = ram.page_address(*index).with_context(|| format!("page {index} lies outside of RAM"))?;
        // SAFETY: `page` points to a whole page of the mapping, which lives as long as `ram`; the arena is another mapping, and the slot
        // has PAGE bytes. The guest may write at the same time: the bytes are then any mixture, which whoever asked knows.
        unsafe { std::ptr::copy_nonoverlapping(page, slot.as_mut_ptr(), PAGE) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn every_page_arrives_in_its_slot_whoever_copies_it() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::open(&dir.path().join("ram"), 16).unwrap();
        for page in 0..ram.pages() {
            ram.mem.write_obj(page * 7, GuestAddress(page * 4096 + 8)).unwrap();
        }
        let pages: Vec<u64> = (0..ram.pages()).rev().step_by(3).collect();
        assert!(pages.len() > 2 * WORTH_SHARING);
        let gather = Gather::new().unwrap();
        for pages in [&pages[..], &pages[..100]] {
            let mut to = vec![0; pages.len() * PAGE];
            gather.copy(&ram, pages, &mut to).unwrap();
            for (page, slot) in pages.iter().zip(to.chunks(PAGE)) {
                assert_eq!(slot[8..16], (page * 7).to_le_bytes());
            }
            assert!(gather.copy(&ram, pages, &mut to[1..]).is_err());
        }
        assert!(gather.copy(&ram, &[ram.pages()], &mut [0; PAGE]).is_err());
    }
}
