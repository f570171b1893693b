//! Every parser of bytes from outside, as functions that take any bytes and must not panic, hang or break what they promise.
//!
//! ```text
//!  corpus/<target>/*  ──► tests/short.rs: each file, then files changed at random, a fraction of a second a target (in `make test`)
//!          └───────────► understudy-fuzz-coverage (libFuzzer, stable Rust): hours, guided by coverage (`make fuzz`)
//! ```
//! A format with a checksum is fed twice: the bytes as they are, and the bytes inside a frame whose checksum is right. Without the
//! second nothing behind the checksum would ever be reached.
//!
//! An input that breaks something is put into the corpus, with the fix: then it is tried in every run.
#![forbid(unsafe_code)]

pub mod input;
pub mod mutate;
pub mod seeds;
pub mod targets;

use std::path::PathBuf;

/// A parser, or what stands behind it.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its directory in the corpus.
    pub name: &'static str,
    /// What it reads, and who could have written it.
    pub about: &'static str,
    /// Feed it. Returns; anything else is a finding.
    pub run: fn(&[u8]),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frame",
        about: "records from peers and boards, in pieces of any size",
        run: targets::protocol::frame,
    },
    Target { name: "control", about: "lines on the control sockets, both ways", run: targets::protocol::control },
    Target { name: "key", about: "key files", run: targets::protocol::key },
    Target {
        name: "handshake",
        about: "whoever connects before it has proved anything",
        run: targets::protocol::handshake,
    },
    Target {
        name: "board",
        about: "messages between machine and board, and both ends of a session",
        run: targets::protocol::board,
    },
    Target {
        name: "paths",
        about: "frames of a session of several paths, and a session under a peer that may say anything",
        run: targets::paths::paths,
    },
    Target { name: "corosync", about: "Corosync's configuration", run: targets::paths::corosync },
    Target { name: "message", about: "replication messages", run: targets::replication::message },
    Target { name: "batch", about: "batches of pages, plain and compressed", run: targets::replication::batch },
    Target {
        name: "state-delta",
        about: "device state, encoded against an older one",
        run: targets::replication::state,
    },
    Target { name: "receiver", about: "a sender that says anything in any order", run: targets::replication::receiver },
    Target { name: "durable", about: "the standby's records on disk", run: targets::replication::durable },
    Target { name: "stage", about: "a stage that a crash left", run: targets::replication::stage },
    Target {
        name: "container",
        about: "a saved machine, down to every device's state",
        run: targets::machine::container,
    },
    Target { name: "bzimage", about: "kernels", run: targets::machine::bzimage },
    Target {
        name: "virtio",
        about: "a guest that puts anything into rings and registers",
        run: targets::machine::virtio,
    },
    Target {
        name: "virtio-blk",
        about: "a guest that asks anything of its disk, and machines that go on with what it asked",
        run: targets::machine::virtio_blk,
    },
    Target {
        name: "virtio-scsi",
        about: "a guest that asks anything of its SCSI controller, somebody at its drive, and machines that go on with what it asked",
        run: targets::machine::virtio_scsi,
    },
    Target {
        name: "virtio-net",
        about: "a guest that sends anything, commands and packets, a network that does so too, and machines that go on with what was set",
        run: targets::machine::virtio_net,
    },
    Target {
        name: "scsi",
        about: "command descriptor blocks and parameter lists",
        run: targets::machine::scsi_command,
    },
    Target {
        name: "watchdog",
        about: "a guest that reads and writes its watchdog in any way, and machines that go on with what it did",
        run: targets::machine::watchdog,
    },
    Target { name: "ports", about: "a guest that reads and writes any port", run: targets::machine::ports },
    Target { name: "cib", about: "what cibadmin prints", run: targets::cluster::cib },
    Target { name: "policy", about: "policy files", run: targets::cluster::policy },
    Target { name: "environment", about: "an agent's environment", run: targets::cluster::environment },
    Target { name: "slice", about: "a disk's slice after a crash", run: targets::disk::slice },
    Target { name: "mirror", about: "both ends of a mirrored disk's session", run: targets::disk::mirror },
    Target { name: "owner", about: "the record of whose disk it is, and names of slices", run: targets::disk::owner },
    Target {
        name: "takeover",
        about: "a directory of slices that anything may have happened to",
        run: targets::disk::takeover,
    },
    Target { name: "storage", about: "what a SCSI target answers; addresses of disks", run: targets::disk::storage },
    Target {
        name: "frames",
        about: "frames that a guest sends and that arrive for it: filters, and whose addresses they are",
        run: targets::net::frames,
    },
    Target {
        name: "stream",
        about: "a switch at the other end of a card's stream socket, in pieces of any size",
        run: targets::net::stream,
    },
    Target { name: "reply", about: "answers by mail, hook and short message", run: targets::alerts::reply },
    Target {
        name: "approval",
        about: "questions and alert settings as they stand in the cluster",
        run: targets::alerts::approval,
    },
    Target {
        name: "spool",
        about: "the queue of alerts after a crash; the alert agent's environment",
        run: targets::alerts::spool,
    },
    Target {
        name: "heartbeat",
        about: "datagrams at a monitor's port, with the cluster's key and without",
        run: targets::estate::heartbeat,
    },
    Target { name: "members", about: "the membership as crm_mon prints it", run: targets::estate::members },
    Target { name: "matrix", about: "rows of the fault matrix", run: targets::estate::matrix },
    Target { name: "simulate", about: "what crm_simulate prints", run: targets::estate::simulate },
    Target { name: "import", about: "a cluster that somebody else has configured", run: targets::estate::import },
    Target { name: "records", about: "the evacuation controller's records", run: targets::estate::records },
    Target { name: "links", about: "what corosync-cfgtool prints", run: targets::estate::links },
    Target {
        name: "snapshot",
        about: "a cluster as the evacuation controller reads it, and what it does about it",
        run: targets::estate::snapshot,
    },
    Target {
        name: "controller",
        about: "clusters that no cluster would ever be, one after the other, for the evacuation controller",
        run: targets::estate::controller,
    },
    Target { name: "journal", about: "a board's journal after a crash", run: targets::cluster::journal },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}

/// Where a target's inputs are kept.
pub fn corpus(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}
