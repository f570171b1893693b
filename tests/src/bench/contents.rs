//! What the benchmark's guest fills its pages with: four kinds, from well to hardly compressible.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Natural language and program text: this repository's own documents and sources.
    Text,
    /// Rows of 128 bytes: keys, times, numbers, short strings, padding.
    Database,
    /// Three quarters of the pages zero, 64 bytes of noise in each of the others.
    Zeros,
    /// Pseudo-random numbers.
    Noise,
}

impl Content {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Text, Self::Database, Self::Zeros, Self::Noise];

    /// As figures are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Database => "database",
            Self::Zeros => "zero-heavy",
            Self::Noise => "random",
        }
    }

    /// Its place in [`Self::ALL`].
    pub fn number(self) -> u64 {
        self as u64
    }

    /// Pieces are taken from its pool at multiples of this, a power of two.
    pub fn grain(self) -> u64 {
        match self {
            Self::Text => 1,
            Self::Database => ROW as u64,
            Self::Zeros | Self::Noise => 8,
        }
    }
}

const ROW: usize = 128;

/// `len` bytes of it; `corpus` is the text.
pub fn pool(content: Content, len: usize, corpus: &[u8]) -> Vec<u8> {
    let mut random = Random(0x5eed_0000 + content.number());
    let mut pool = Vec::with_capacity(len + ROW);
    match content {
        Content::Text => {
            pool.extend(corpus.iter().copied().cycle().take(if corpus.is_empty() { 0 } else { len }));
        }
        Content::Database => {
            for key in 0..(len / ROW) as u64 {
                pool.extend_from_slice(&row(key, &mut random));
            }
        }
        Content::Zeros => {
            for _ in 0..len / 4096 {
                let mut page = [0; 4096];
                if random.next().is_multiple_of(4) {
                    let at = random.next() as usize % (4096 / 64) * 64;
                    for word in page[at..at + 64].chunks_exact_mut(8) {
                        word.copy_from_slice(&random.next().to_le_bytes());
                    }
                }
                pool.extend_from_slice(&page);
            }
        }
        Content::Noise => (0..len / 8).for_each(|_| pool.extend_from_slice(&random.next().to_le_bytes())),
    }
    pool.resize(len, 0);
    pool
}

fn row(key: u64, random: &mut Random) -> [u8; ROW] {
    const NAMES: [&str; 8] = ["Meier", "Okafor", "Lindqvist", "Tanaka", "O'Brien", "Garcia", "Novak", "Dubois"];
    const STATES: [&str; 4] = ["open", "dispatched", "on site", "closed"];
    let mut row = [0; ROW];
    row[..8].copy_from_slice(&key.to_le_bytes());
    row[8..16].copy_from_slice(&(1_700_000_000_000 + key * 977 + random.next() % 900).to_le_bytes());
    row[16..24].copy_from_slice(&((random.next() % 1_000_000) as f64 / 100.0).to_le_bytes());
    row[24..28].copy_from_slice(&((random.next() % 500) as u32).to_le_bytes());
    let text = format!(
        "{}, case {:06}: {}",
        NAMES[random.next() as usize % NAMES.len()],
        random.next() % 1_000_000,
        STATES[random.next() as usize % STATES.len()]
    );
    let text = &text.as_bytes()[..text.len().min(ROW - 32)];
    row[28] = text.len() as u8;
    row[32..32 + text.len()].copy_from_slice(text);
    row
}

/// xorshift64*: the same numbers in every run, so that runs can be compared.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// A text corpus that is at hand wherever the benchmark runs: the documents and sources of the workspace at `root`.
pub fn corpus(root: &Path, most: usize) -> Result<Vec<u8>> {
    let mut files = Vec::new();
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("reading {}", directory.display()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                directories.push(path);
            } else if name.ends_with(".md") || name.ends_with(".rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut text = Vec::new();
    for file in files {
        text.extend(fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
        if text.len() >= most {
            break;
        }
    }
    text.truncate(most);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_compress_as_their_names_say() {
        let text =
            "Nothing leaves the machine before the checkpoint that contains the state which produced it. ".repeat(99);
        let share = |content| {
            let pool = pool(content, 1 << 18, text.as_bytes());
            assert_eq!(pool.len(), 1 << 18);
            let packed: usize = pool.chunks(4096).map(|page| lz4_flex::block::compress(page).len()).sum();
            packed as f64 / pool.len() as f64
        };
        assert!(share(Content::Noise) > 0.99);
        assert!((0.2..0.7).contains(&share(Content::Database)));
        assert!(share(Content::Zeros) < 0.05);
        assert!(share(Content::Text) < 0.7);
    }
}
