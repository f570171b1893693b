//! Who is told what happens in the cluster, and who may say yes.
//!
//! ```text
//!  Pacemaker ── agent (CRM_alert_*) ─┐
//!  controller ──────── Outbox ───────┼─► spool (repeat: told once, counted) ─► sender ─► deliver: mail, SMS, hook, command
//!  understudy-alert tell ────────────┘     └─ journal
//!
//!  controller ── ask ─► record in the cluster, codes to the approvers ─┄► reply (mail, hook), understudy-crm approve ─► answering
//! ```
//! [`approval`] decides what an answer is worth and [`repeat`] what is told: both pure. [`cluster`] is the only way to the cluster's
//! configuration.
#![forbid(unsafe_code)]

pub mod agent;
pub mod alarm;
pub mod answering;
pub mod approval;
pub mod cluster;
pub mod deliver;
pub mod journal;
pub mod outbox;
pub mod repeat;
pub mod reply;
pub mod sender;
pub mod settings;
pub mod spool;

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// This node's name, as Corosync and `uname -n` have it.
pub fn node_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "localhost".into())
}
