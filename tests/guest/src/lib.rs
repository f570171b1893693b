//! What the demo guest and the device at the far end of its serial line agree on, and the guest's checks.
//!
//! | module | holds |
//! |---|---|
//! | [`line`] | the numbered, checksummed lines that travel both ways, and the receiver's book-keeping |
//! | [`pattern`] | the memory pattern that shows a page which went back in time |
//! | [`params`] | `understudy.key=value` on the kernel command line |
//!
//! All of it is pure: it runs in the guest and in the tests of the host alike. What touches the machine is in the
//! program (`main.rs`).
#![forbid(unsafe_code)]

pub mod line;
pub mod params;
pub mod pattern;
