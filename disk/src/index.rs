//! Where the newest content of every redirected sector is: one map over all slices that are not merged yet.
//!
//! Extents never overlap; a newer write cuts out what it covers. Memory: about 40 bytes an extent ([`Index::bytes`]), so that 1 GiB of scattered
//! 4 KiB writes takes about 10 MiB, and of 1 MiB writes 40 KiB. The number of extents is bounded by [`crate::Limits`].

use std::collections::BTreeMap;

/// Where content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In no slice: the base has it.
    Base,
    /// In the slice of this serial number, from this byte of its file on.
    Slice {
        /// Serial number.
        serial: u64,
        /// Position in the slice's file.
        data: u64,
    },
    /// Zeroes, by a record in the slice of this serial number.
    Zero {
        /// Serial number.
        serial: u64,
        /// They need not keep their room.
        unmap: bool,
    },
}

/// A stretch of sectors with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First sector.
    pub sector: u64,
    /// How many.
    pub sectors: u64,
    /// Where their content is.
    pub source: Source,
}

/// Packed: the map's memory is what bounds how much may wait.
#[derive(Debug, Clone, Copy)]
struct Extent {
    sectors: u32,
    /// Serial number modulo 2³⁰ (so many slices never wait together), and the kind in the upper two bits.
    slot: u32,
    data: u64,
}

const SLOT: u32 = (1 << 30) - 1;
const ZERO: u32 = 1 << 30;
const UNMAP: u32 = 1 << 31;

fn slot(serial: u64) -> u32 {
    (serial % (1 << 30)) as u32
}

/// The map.
#[derive(Debug, Default)]
pub struct Index {
    extents: BTreeMap<u64, Extent>,
    /// A serial number near all that are in here; slots are relative to it.
    near: u64,
}

impl Index {
    /// Extents in it.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Nothing is redirected.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Memory that it takes, about: 24 bytes an extent, in tree nodes that are not full (tests/memory.rs measures it).
    pub fn bytes(&self) -> u64 {
        self.extents.len() as u64 * 41
    }

    fn serial(&self, slot: u32) -> u64 {
        let base = self.near & !u64::from(SLOT);
        let slot = u64::from(slot & SLOT);
        // The nearest number with this remainder.
        let half = 1 << 29;
        let here = base + slot;
        if here > self.near + half {
            here.saturating_sub(1 << 30)
        } else if here + half < self.near {
            here + (1 << 30)
        } else {
            here
        }
    }

    fn source(&self, e: Extent) -> Source {
        let serial = self.serial(e.slot);
        if e.slot & ZERO == 0 {
            Source::Slice { serial, data: e.data }
        } else {
            Source::Zero { serial, unmap: e.slot & UNMAP != 0 }
        }
    }

    fn advance(e: Extent, by: u64) -> Extent {
        let data = if e.slot & ZERO == 0 { e.data + by * crate::block::SECTOR } else { e.data };
        // Less than its length, which fits.
        Extent { sectors: e.sectors - by as u32, data, ..e }
    }

    /// Cut `[sector, end)` out. `which` says which extents may go.
    fn clear(&mut self, sector: u64, end: u64, which: impl Fn(u32) -> bool) {
        let begin = match self.extents.range(..sector).next_back() {
            Some((&at, e)) if at + u64::from(e.sectors) > sector => at,
            _ => sector,
        };
        // Most often one or two; a vector, as the map cannot be changed while it is walked.
        let hit: Vec<(u64, Extent)> =
            self.extents.range(begin..end).filter(|(_, e)| which(e.slot & SLOT)).map(|(&at, &e)| (at, e)).collect();
        for (at, e) in hit {
            let stop = at + u64::from(e.sectors);
            self.extents.remove(&at);
            if at < sector {
                self.extents.insert(at, Extent { sectors: (sector - at) as u32, ..e });
            }
            if stop > end {
                self.extents.insert(end, Self::advance(e, end - at));
            }
        }
    }

    /// A newer write: these sectors come from there from now on.
    pub fn insert(&mut self, piece: Piece) {
        let (serial, data, flags) = match piece.source {
            Source::Base => return self.clear(piece.sector, piece.sector + piece.sectors, |_| true),
            Source::Slice { serial, data } => (serial, data, 0),
            Source::Zero { serial, unmap } => (serial, 0, ZERO | if unmap { UNMAP } else { 0 }),
        };
        self.near = serial;
        self.clear(piece.sector, piece.sector + piece.sectors, |_| true);
        // A record has at most 2³² − 1 sectors.
        let extent = Extent { sectors: piece.sectors as u32, slot: slot(serial) | flags, data };
        self.extents.insert(piece.sector, extent);
    }

    /// These sectors were merged: what in them comes from a slice up to `serial` is in the base now.
    pub fn merged(&mut self, sector: u64, sectors: u64, serial: u64) {
        let near = self.near;
        let probe = Index { extents: BTreeMap::new(), near };
        self.clear(sector, sector + sectors, |slot| probe.serial(slot) <= serial);
    }

    /// Where `[sector, sector + sectors)` comes from, in order and without gaps.
    pub fn lookup(&self, sector: u64, sectors: u64) -> Vec<Piece> {
        let end = sector + sectors;
        let mut pieces = Vec::new();
        let mut at = sector;
        let before = self.extents.range(..sector).next_back().filter(|(at, e)| *at + u64::from(e.sectors) > sector);
        for (&start, &e) in before.into_iter().chain(self.extents.range(sector..end)) {
            if start > at {
                pieces.push(Piece { sector: at, sectors: start - at, source: Source::Base });
                at = start;
            }
            let e = Self::advance(e, at - start);
            let sectors = u64::from(e.sectors).min(end - at);
            pieces.push(Piece { sector: at, sectors, source: self.source(e) });
            at += sectors;
        }
        if at < end {
            pieces.push(Piece { sector: at, sectors: end - at, source: Source::Base });
        }
        pieces
    }

    /// All extents, in order of sectors.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.extents.iter().map(|(&sector, &e)| Piece { sector, sectors: e.sectors.into(), source: self.source(e) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(writes: &[(u64, u64, u64, bool)], sector: u64) -> Source {
        let newest = writes.iter().rev().find(|(at, n, ..)| (*at..*at + *n).contains(&sector));
        match newest {
            None => Source::Base,
            Some((_, _, serial, true)) => Source::Zero { serial: *serial, unmap: false },
            Some((at, _, serial, false)) => Source::Slice { serial: *serial, data: 64 + (sector - at) * 512 },
        }
    }

    fn flat(pieces: impl IntoIterator<Item = Piece>) -> Vec<(u64, Source)> {
        let mut all = Vec::new();
        for piece in pieces {
            for i in 0..piece.sectors {
                let source = match piece.source {
                    Source::Slice { serial, data } => Source::Slice { serial, data: data + i * 512 },
                    other => other,
                };
                all.push((piece.sector + i, source));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn every_sector_comes_from_its_newest_write_until_that_is_merged(
            writes in prop::collection::vec((0u64..60, 1u64..20, 0u64..4, any::<bool>()), 0..60), first in prop_oneof![Just(0u64), Just((1 << 30) - 2)], merged in 0u64..5,
        ) {
            // Serial numbers only grow.
            let mut serial = first;
            let writes: Vec<_> = writes.into_iter().map(|(at, n, step, zero)| { serial += step; (at, n, serial, zero) }).collect();
            let mut index = Index::default();
            for &(sector, sectors, serial, zero) in &writes {
                let source = if zero { Source::Zero { serial, unmap: false } } else { Source::Slice { serial, data: 64 } };
                index.insert(Piece { sector, sectors, source });
            }
            for (sector, source) in flat(index.lookup(0, 100)) {
                prop_assert_eq!(source, naive(&writes, sector));
            }
            let upto = first + merged;
            for &(sector, sectors, serial, _) in &writes {
                if serial <= upto {
                    index.merged(sector, sectors, upto);
                }
            }
            for (sector, source) in flat(index.lookup(0, 100)) {
                let expected = match naive(&writes, sector) {
                    Source::Slice { serial, .. } | Source::Zero { serial, .. } if serial <= upto => Source::Base,
                    other => other,
                };
                prop_assert_eq!(source, expected);
            }
        }
    }
}
