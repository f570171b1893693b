//! The device at the far end of a board's serial line: the judge of the demo and of every power-cut campaign.
//!
//! It stands where a GPS or a controller would stand. It knows nothing of clusters, standbys or takeovers: it writes
//! numbered lines, and it holds everything that arrives against the rule that a cable would keep: every byte once and in
//! order, from one machine that never rebooted and whose clock never went back.
//!
//! ```text
//!              bytes ──► oracle::Oracle ──► events (JSON lines)      pure: bytes and times in, events out
//!   port::Port ─┤             │
//!              ◄── D lines    └──► report::Verdict (JSON)
//!              run::run: the loop around both, its control socket, its end
//! ```
//! The lines themselves are described in [`lab_guest::line`].

pub mod oracle;
pub mod port;
pub mod report;
pub mod run;
