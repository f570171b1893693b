//! Control sockets: one JSON object a line, request then reply, over a unix stream socket (mode 0600, root's).
//!
//! ```text
//! → {"cmd":"status"}
//! ← {"ok":{...}}
//! → {"cmd":"promote","generation":3,"from":{"kind":"cold-boot"}}
//! ← {"error":"the machine already runs as generation 4"}
//! ```
//! Any number of connections; requests on one connection are answered in order. A line is at most [`MAX_LINE`] bytes.
//! Every reply is either `{"ok": …}` or `{"error": "sentence"}`.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Generation};
use crate::statistics::{DiskVerifyStatus, Statistics, VerifyStatus};
use crate::watchdog::WatchdogStatus;

mod board;
mod devices;
mod line;
mod mirror;
mod shape;

pub use board::{BoardRequest, BoardStatus};
pub use devices::{CdromStatus, DiskStatus, NicStatus, SerialStatus};
pub use line::{ControlClient, ControlError, MAX_LINE, Reply, call_once, encode_line, read_line};
pub use mirror::{
    DiskCompared, DiskQuestion, DiskVerifyStep, MirrorBegun, MirrorDurable, MirrorPiece, MirrorPieces, MirrorWhat,
    Sealed,
};
pub use shape::{CdromShape, DiskShape, MachineShape, NicShape};

/// A request to `understudy-vmm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum VmmRequest {
    /// Reply: [`VmmStatus`].
    Status,
    /// Stop the vCPUs; guest time stops too. Reply: `null`.
    Pause,
    /// Continue after `Pause`. Reply: `null`.
    Resume,
    /// Press the ACPI power button. Reply: `null`, at once; the guest decides what follows.
    PowerButton,
    /// End the machine and the process at once, without asking the guest. Reply: `null`, then the socket closes.
    Quit,
    /// Make a prepared standby the running machine. Reply: `null` once the vCPUs run. Outputs wait (gate `Hold`) except
    /// those that the image's own checkpoint already contained.
    Promote {
        /// The generation under which it runs from now on.
        generation: Generation,
        /// What it runs from.
        from: PromoteFrom,
    },
    /// Write a whole machine (device state file; RAM stays in the RAM file or is written too) to `dir`. Reply: `null`.
    Save {
        /// Directory to create the files in.
        dir: String,
    },

    /// Begin a replication session on *this* connection. At most one exists; a second attach is refused while the first
    /// lives. When the connection closes, whatever the reason: gate → `Hold`, dirty log off, a running cut is
    /// aborted and the guest resumed (unless it was the final one and had been committed). Reply: [`Attached`].
    Attach,
    /// As [`VmmRequest::Attach`], to bring a machine that nobody protects to another node: refused unless it runs with its gate
    /// open. The gate stays open until the last cut; when the session ends without a hand-over it is open again.
    /// Reply: [`Attached`].
    AttachToMigrate,
    /// (session) Start the dirty log: from the reply on, every write to RAM by guest or VMM is recorded. Reply: `null`.
    DirtyLogStart,
    /// (session) Fetch and clear the dirty log without pausing: a bitmap of one bit a RAM page (little endian, bit 0 of
    /// byte 0 is page 0) at the arena's start. Reply: [`Harvested`].
    Harvest,
    /// (session) Copy pages that were written and will probably not be written again soon, while the guest runs: they can travel
    /// before the cut. What is written again after its copy is in the cut once more, so the newest copy of a page counts. Reply:
    /// [`Captured`], without device state.
    Precopy {
        /// The epoch that these pages belong to: the one that ends at the next cut.
        epoch: Epoch,
    },
    /// (session) Cut. Reply: [`Captured`], when the arena is filled: with strategies other than `stop` the guest runs again
    /// long before. While `more` is true the vCPUs stay stopped and the rest follows on [`VmmRequest::CutContinue`].
    Cut {
        /// The epoch that ends here.
        epoch: Epoch,
        /// Switch the gate to `Hold` inside the pause: the first complete checkpoint arms protection.
        arm: bool,
        /// Leave the vCPUs stopped afterwards: the last checkpoint of a planned hand-over.
        last: bool,
        /// What was copied early for this epoch ([`VmmRequest::Precopy`]) did not reach the standby: it is in this cut again.
        #[serde(default)]
        again: bool,
    },
    /// (session) The arena's content was taken; fill it again. Reply: [`Captured`].
    CutContinue,
    /// (session) Begin with the copies of the mirrored disks, which are so (one each, in the order of [`Attached::mirrored`], as
    /// `understudy_disk::mirror::PeerState`). The gate is open. Reply: [`MirrorBegun`].
    MirrorBegin {
        /// One for each mirrored disk.
        copies: Vec<serde_json::Value>,
    },
    /// (session) Read what brings the copies into step into the disk arena. Reply: [`MirrorPieces`]. While the guest runs unprotected what it writes again comes
    /// again; after the arming cut the rest is what the disks were when protection began.
    MirrorRead,
    /// (session) What the copies say: up to which part they are durable, and what differs of that which they compared. Reply: `null`.
    MirrorDurable {
        /// One for each mirrored disk.
        copies: Vec<MirrorDurable>,
    },
    /// (session) The copies are in step, durably ([`MirrorPieces::in_step`]). Reply: `null`.
    MirrorDone,
    /// (session) Read what the copies lack of the slices that are written and were not read yet into the disk arena. After
    /// [`VmmRequest::SealDisks`], until there is nothing more, that is all of the epoch. Reply: [`MirrorPieces`].
    MirrorLog,
    /// A step of a comparison of mirrored disks with their copies, which are in step in a session on another connection. The comparison ends with this
    /// connection. Reply: as said there.
    VerifyDisks {
        /// What to do.
        step: DiskVerifyStep,
    },
    /// (session) Make durable what the disks have of the checkpoint of `epoch`, before the standby is told the epoch's end: then a checkpoint
    /// that is committed anywhere finds its disks. Only for machines with [`Attached::disks`]. Reply: [`Sealed`].
    SealDisks {
        /// The epoch, which was cut.
        epoch: Epoch,
    },
    /// (session) The standby holds the checkpoint of `epoch`, verified: open the gate for what it covers. Reply: `null`.
    Committed {
        /// The epoch that was committed.
        epoch: Epoch,
    },
    /// (session) The veto against the standby is durable: outputs need not wait any more (gate `Open`). Reply: `null`.
    GateOpen,

    /// What a machine must be like to run from this one's image. Reply: [`MachineShape`].
    Shape,
    /// Where the vCPUs of a running machine are; they are stopped for a moment, as for a cut. Reply: a list of [`VcpuPosition`], one a
    /// vCPU.
    Positions,

    /// Choose how checkpoints are captured, from the next cut on. Reply: `null`.
    SetCapture {
        /// The way.
        strategy: Strategy,
    },
    /// Let the vCPUs run only for a share of the time. Reply: `null`.
    Throttle {
        /// Share of the time that they run, 1 to 100; 100 ends the throttling.
        percent: u8,
    },
    /// Enlarge a disk while the machine runs. The guest is told. Reply: `null`.
    ResizeDisk {
        /// Its name.
        disk: String,
        /// Its new size in bytes, not smaller than the old one.
        bytes: u64,
    },
    /// Take what lies in a CD-ROM drive out. Reply: `null`.
    Eject {
        /// The drive's name.
        drive: String,
        /// Also when the guest has locked the drive.
        force: bool,
    },
    /// Put a medium into a CD-ROM drive; what lies in it goes. Reply: `null`.
    Insert {
        /// The drive's name.
        drive: String,
        /// An ISO image, absolute; the same file on every node.
        file: String,
        /// Also when the guest has locked the drive.
        force: bool,
    },
    /// Wait until outputs are held that no cut covers yet and that the caller has not heard of. Reply: [`OutputHeld`]; at the latest
    /// after `timeout_ms`, with an unchanged number. Use a connection of its own.
    AwaitOutput {
        /// [`OutputHeld::number`] of the last reply, 0 at first.
        seen: u64,
        /// Longest wait in ms, at most 10,000.
        timeout_ms: u64,
    },
}

/// A vCPU in the reply to [`VmmRequest::Positions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuPosition {
    /// Address of the next instruction.
    pub rip: u64,
    /// It waits for an interrupt.
    pub halted: bool,
}

/// How a checkpoint's pages are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Copied while the guest stands still (Remus).
    Stop,
    /// Locked at the cut; a write to a locked page traps, the old content is kept, the write goes on (S1's lock and copy).
    Lock,
    /// Copied while the guest runs on; a copy counts only if the dirty log shows that the page was not written since the cut.
    Validate,
    /// Chosen for each cut and class of pages from the costs that are measured all the time.
    Auto,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Stop, Self::Lock, Self::Validate, Self::Auto];
    /// Its name, as in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Lock => "lock",
            Self::Validate => "validate",
            Self::Auto => "auto",
        }
    }
}

impl std::str::FromStr for Strategy {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|s| s.name() == name);
        found.ok_or_else(|| format!("there is no capture strategy {name:?}: choose stop, lock, validate or auto"))
    }
}

/// Reply to [`VmmRequest::AwaitOutput`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputHeld {
    /// Grows each time that output begins to wait for a cut that was not made yet.
    pub number: u64,
}

/// How checkpoints are captured, in [`VmmStatus`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CaptureStatus {
    /// What was asked for (see [`Strategy::name`]).
    pub strategy: String,
    /// What the last cut used, and why, as a sentence.
    pub choice: String,
    /// Cuts since the process started.
    pub cuts: u64,
    /// Cuts that had to be repeated because the guest wrote to pages before their copies were made.
    pub repeated: u64,
    /// Pages in the last cut.
    pub pages: u64,
    /// Of these, copied while the guest stood still.
    pub stopped_pages: u64,
    /// Pages that stay writable and are copied at every cut, because protecting them again costs more.
    pub hot_pages: u64,
    /// Pages copied before the last cut.
    pub early_pages: u64,
    /// Measured costs, ns: a write that traps in the dirty log.
    pub fault_ns: u64,
    /// A page copied.
    pub copy_ns: u64,
    /// A page protected again.
    pub protect_ns: u64,
    /// All vCPUs stopped, from the signal.
    pub kick_ns: u64,
    /// vCPU and device state saved.
    pub state_ns: u64,
    /// A write that traps in a locked page.
    pub lock_fault_ns: u64,
    /// Share of the time that the vCPUs may run, percent.
    pub throttle_percent: u8,
    /// Time that the guest stood still for cuts since the process started, µs.
    pub stood_still_us: u64,
}

/// What a promoted machine runs from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum PromoteFrom {
    /// Power on.
    ColdBoot,
    /// RAM is in the RAM file already; devices and vCPUs are loaded from `state_file`.
    Image {
        /// Device state as the VMM captured it.
        state_file: String,
        /// The committed epoch it belongs to.
        epoch: Epoch,
    },
}

/// Where outputs wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gate {
    /// Outputs leave when their checkpoint is committed.
    Hold,
    /// Outputs leave at once: the machine is durably recorded as unprotected (or was never to be protected).
    Open,
}

/// Life of the machine in this VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmState {
    /// Built over the image's RAM; vCPUs never started.
    Standby,
    /// vCPUs run.
    Running,
    /// vCPUs stopped on request.
    Paused,
    /// The last checkpoint was handed over; the machine may not run here again.
    HandedOver,
    /// The guest shut itself down (ACPI S5).
    ShutDown,
    /// A board or peer showed a newer generation; the machine stopped itself.
    Fenced,
}

/// Reply to [`VmmRequest::Status`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// Machine name.
    pub machine: String,
    /// Life of the machine.
    pub state: VmmState,
    /// Its generation (0 on a standby).
    pub generation: Generation,
    /// Output gate.
    pub gate: Gate,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM in bytes.
    pub ram_bytes: u64,
    /// VM time: nanoseconds that the machine has run, over all its hosts.
    pub vm_time_ns: u64,
    /// Last cut and last committed epoch of the current replication session.
    pub last_cut: Epoch,
    /// See `last_cut`.
    pub last_committed: Epoch,
    /// Whether a replication session is attached.
    pub replicated: bool,
    /// KVM flavour in use, e.g. `kvm_amd`, `kvm_intel`, `kvm_pvm`.
    pub kvm_backend: String,
    /// Guest resets seen.
    pub resets: u64,
    /// One line per serial port: name, board address, link state, bytes each way, bytes held by the gate.
    pub serial: Vec<SerialStatus>,
    /// The most recent pauses for a cut, newest last, in microseconds, at most 512.
    pub recent_pauses_us: Vec<u32>,
    /// How checkpoints are captured.
    #[serde(default)]
    pub capture: CaptureStatus,
    /// The disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStatus>,
    /// The CD-ROM drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdroms: Vec<CdromStatus>,
    /// The network cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicStatus>,
    /// Its watchdog, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogStatus>,
}

/// Reply to [`VmmRequest::Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The machine's generation.
    pub generation: Generation,
    /// Size of the RAM file in bytes, a multiple of 4096.
    pub ram_bytes: u64,
    /// Size of the arena file in bytes.
    pub arena_bytes: u64,
    /// The machine has disks that can be written: [`VmmRequest::SealDisks`] before the end of every epoch.
    #[serde(default)]
    pub disks: bool,
    /// Names of the mirrored ones.
    #[serde(default)]
    pub mirrored: Vec<String>,
}

/// Reply to [`VmmRequest::Harvest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Harvested {
    /// Bits set in the bitmap.
    pub dirty_pages: u64,
    /// Bytes of bitmap at the arena's start.
    pub bitmap_bytes: u64,
}

/// Reply to [`VmmRequest::Cut`] and [`VmmRequest::CutContinue`]: what the arena holds now. All offsets are bytes from the
/// arena's start. A page index is the page's offset in the RAM file divided by 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// The epoch.
    pub epoch: Epoch,
    /// Number of pages in this piece.
    pub pages: u64,
    /// Offset of `pages` little-endian u64 page indices.
    pub indices_offset: u64,
    /// Offset of `pages` × 4096 bytes, in the order of the indices.
    pub pages_offset: u64,
    /// Offset of the device state; only in the last piece.
    pub state_offset: u64,
    /// Length of the device state in bytes; 0 while `more`.
    pub state_len: u64,
    /// More pieces follow; the vCPUs are stopped until the last.
    pub more: bool,
    /// How long the vCPUs were stopped, from the request to the resume, in microseconds (last piece only).
    pub pause_us: u64,
    /// VM time at the cut, ns.
    pub vm_time_ns: u64,
}

/// A request to `understudy-replicator`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum ReplicatorRequest {
    /// Reply: [`ReplicatorStatus`].
    Status,
    /// Become the sender: attach to the local VMM, protect it. Reply: `null`, at once; progress is in the status.
    Promote,
    /// Become a receiver again. Reply: `null`.
    Demote,
    /// (sender) Take and commit the last checkpoint; the VMM stays stopped. Reply: [`HandedOver`]. On any error the
    /// machine runs on here.
    HandOver,
    /// (receiver) Stop receiving, make the image whole at its newest committed epoch, and never receive under a
    /// generation below `generation` again. Idempotent. Reply: [`TakenOver`].
    TakeOver {
        /// The generation of the machine that will run from the image.
        generation: Generation,
    },
    /// (receiver) Copy the image, exactly one committed epoch of it, to `dir`: the files `ram` and `state`. Epochs go on meanwhile and
    /// wait only for the last pages. Reply: [`CopiedImage`].
    CopyImage {
        /// An existing directory; best in the tmpfs that the image is in.
        dir: String,
    },
    /// (sender) Compare all of RAM with the standby's, while the guest runs; joins a comparison that is under way. Reply:
    /// [`VerifyStarted`], at once; what comes of it is in the status.
    Verify,
    /// (sender) Compare the mirrored disks with their copies, all of them, while the guest runs; joins a comparison that is under way. Reply:
    /// [`VerifyStarted`], at once; what comes of it is in the status.
    VerifyDisks,
    /// End the process. Reply: `null`, then the socket closes.
    Quit,
}

/// Reply to [`ReplicatorRequest::CopyImage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedImage {
    /// The epoch that the copy is.
    pub epoch: Epoch,
    /// The generation of the machine that made it.
    pub generation: Generation,
    /// Pages copied, those that changed meanwhile again each time.
    pub pages: u64,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// How long all of it took, ms.
    pub took_ms: u64,
    /// How long arriving epochs waited for the last round, µs.
    pub held_us: u64,
}

/// Reply to [`ReplicatorRequest::Verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStarted {
    /// See [`VerifyStatus::pass`].
    pub pass: u64,
}

/// Reply to [`ReplicatorRequest::HandOver`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    /// The last epoch, committed on the standby.
    pub epoch: Epoch,
}

/// Reply to [`ReplicatorRequest::TakeOver`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// The newest committed epoch, or `None` when there is no image to run from.
    pub image: Option<TakenImage>,
}

/// A whole image, ready to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenImage {
    /// The committed epoch.
    pub epoch: Epoch,
    /// The generation of the machine that made it.
    pub generation: Generation,
    /// File with the device state.
    pub state_file: String,
}

/// What the replicator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Sends (Promoted).
    Sender,
    /// Receives (Unpromoted).
    Receiver,
}

/// State of a standby's replica, in DRBD's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// No usable image.
    Inconsistent,
    /// The first copy is under way.
    Syncing,
    /// Holds the newest committed epoch.
    UpToDate,
    /// Whole, but the primary has gone on without it: never to be promoted.
    Outdated,
}

/// State of a source, in S1's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceState {
    /// Initial copy.
    Startup,
    /// Runs; changes flow; countdown to the next cut.
    Migrating,
    /// At a cut.
    Separating,
    /// Source lost.
    Collapsed,
    /// Resumed here from the last complete checkpoint; or runs unprotected.
    Running,
}

/// Reply to [`ReplicatorRequest::Status`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicatorStatus {
    /// Machine name.
    pub machine: String,
    /// Sender or receiver.
    pub role: Role,
    /// The replica that this process writes to: its own image as receiver, the peer's as sender.
    pub replica: ReplicaState,
    /// Source's state; on a receiver `Collapsed` while no sender is connected.
    pub source: SourceState,
    /// Whether the other side is connected.
    pub connected: bool,
    /// Address of the other side, if any.
    pub peer: Option<String>,
    /// Generation of the image or of the running machine.
    pub generation: Generation,
    /// Newest committed epoch.
    pub committed: Epoch,
    /// Newest cut (sender) or newest epoch begun (receiver).
    pub current: Epoch,
    /// Time since the last commit, ms.
    pub lag_ms: u64,
    /// (sender) whether a durable veto against the peer stands.
    pub vetoed: bool,
    /// (sender) protected: gate held, peer `UpToDate`, no veto.
    pub protected: bool,
    /// Progress of the first copy, 0.0 to 1.0.
    pub sync_progress: f64,
    /// Duration of the last complete first copy, ms; 0 if none.
    pub last_sync_ms: u64,
    /// Payload bytes sent (received) since the process started, before and after encoding.
    pub raw_bytes: u64,
    /// See `raw_bytes`.
    pub wire_bytes: u64,
    /// Epochs committed since the process started.
    pub epochs: u64,
    /// Times that protection was lost since the process started.
    pub losses: u64,
    /// Pause percentiles over the newest 512 epochs, µs.
    pub pause_p50_us: u64,
    /// See `pause_p50_us`.
    pub pause_p99_us: u64,
    /// See `pause_p50_us`.
    pub pause_max_us: u64,
    /// The last thing worth telling a person, e.g. why the peer was refused.
    pub note: String,
    /// Histograms and bytes at each stage.
    #[serde(default)]
    pub statistics: Statistics,
    /// The comparison of RAM between primary and standby.
    #[serde(default)]
    pub verify: VerifyStatus,
    /// Comparisons of mirrored disks.
    #[serde(default)]
    pub disk_verify: DiskVerifyStatus,
    /// The network paths to the other side, if several are configured.
    #[serde(default)]
    pub paths: Vec<PathStatus>,
}

/// A network path between two replicators, in [`ReplicatorStatus`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Where it ends, as far as known.
    pub address: String,
    /// It is connected and answers.
    pub works: bool,
    /// It carries the checkpoints now.
    pub active: bool,
    /// For how long it has worked, or has been missing, ms.
    pub since_ms: u64,
    /// Why it is missing.
    pub why: String,
    /// Times that it went missing in this session.
    pub losses: u64,
    /// Bytes sent on it, before encryption.
    pub sent_bytes: u64,
    /// The same of what was received.
    pub received_bytes: u64,
    /// Bytes of `sent_bytes` that had been sent before: on another path, or on an earlier connection of this one.
    pub again_bytes: u64,
    /// Round trip, smoothed, µs; 0 until known.
    pub rtt_us: u64,
}

/// Reply to [`ReplicatorRequest::Status`] of the process that receives migrations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationsStatus {
    /// This node.
    pub node: String,
    /// Address that it listens on.
    pub listen: String,
    /// What is arriving.
    pub incoming: Vec<IncomingStatus>,
    /// Machines that were handed over to this node since the process started.
    pub handed_over: u64,
    /// The last thing worth telling a person.
    pub note: String,
}

/// A machine that is arriving, in [`MigrationsStatus`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IncomingStatus {
    /// The machine.
    pub machine: String,
    /// The node that sends it.
    pub from: String,
    /// Progress of the first copy, 0.0 to 1.0; 0 while its VMM is being prepared.
    pub progress: f64,
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufReader};

    use super::*;

    #[test]
    fn the_documented_lines_are_what_is_written() {
        let line = String::from_utf8(encode_line(&VmmRequest::Status)).unwrap();
        assert_eq!(line, "{\"cmd\":\"status\"}\n");
        let promote = VmmRequest::Promote { generation: Generation(3), from: PromoteFrom::ColdBoot };
        let line = String::from_utf8(encode_line(&promote)).unwrap();
        assert_eq!(line, "{\"cmd\":\"promote\",\"generation\":3,\"from\":{\"kind\":\"cold-boot\"}}\n");
        assert_eq!(encode_line(&Reply::<()>::Ok(())), b"{\"ok\":null}\n");
        assert_eq!(encode_line(&Reply::<()>::Error("no".into())), b"{\"error\":\"no\"}\n");
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut endless = BufReader::new(io::repeat(b'x'));
        assert!(read_line(&mut endless).is_err());
    }
}
