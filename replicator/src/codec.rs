//! Pages and device state on the wire: what the sender leaves out, and how the receiver gets it back.
//!
//! ```text
//!  dirty page ─► unchanged? ─► zero? ─► delta against the shadow copy │ same as another page │ raw ─► batch ─► LZ4, zstd?
//!  (writer)      drop          run      (delta)                        (shadow: hashes)               (method) only if the
//!                                                                                                              link is slow
//!  batch ─► plain? ─► record by record: read the base (this stage, or RAM) ─► whole page ─► its hash ─► stage, digest
//!  (decoder)
//! ```
//! The pages of a *batch* are [`record`]s; a batch as a whole may be compressed ([`batch`], [`method`]). What the sender
//! may refer to is what the receiver holds *at that point of the stream*, and [`crate::shadow`] is the sender's exact knowledge of
//! it: a record is decoded over the same page as it stands after all records before it, in this epoch's stage or in RAM.
//!
//! Three rules keep the two ends in step:
//! * Whatever the writer has encoded reaches the receiver in that order, at once or by sending the kept frames again byte for
//!   byte; or a new first copy begins, and with it an empty shadow ([`BatchWriter::restart`]).
//! * The receiver forgets an epoch that did not end; RAM is then the committed one, which is what the kept frames follow.
//! * Both ends' [`EpochDigest`]s cover the *content* of the pages, so a base that differs is found before the commit.
//!   Such an image is not continued: the receiver then asks for a first copy.

pub mod batch;
pub mod decoder;
pub mod delta;
pub mod digest;
pub mod measure;
pub mod method;
pub mod record;
pub mod state;
pub mod writer;

pub use self::batch::BatchError;
pub use self::decoder::{Decoder, Target};
pub use self::digest::{EpochDigest, PageHash, page_hash};
pub use self::writer::{BatchWriter, EncodingConfig};

/// Bytes in a page: the unit of the dirty log and of the RAM file.
pub const PAGE: usize = 4096;

/// One page's content.
pub type Page = [u8; PAGE];

/// Whether all of `page` is zero.
pub fn is_zero(page: &Page) -> bool {
    // A cache line at a time: the compiler turns this into vector instructions, and a page that is in use usually
    // differs within its first words.
    page.as_chunks::<64>().0.iter().all(|line| line.iter().fold(0, |sum, byte| sum | byte) == 0)
}

#[cfg(test)]
mod tests;
