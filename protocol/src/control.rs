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

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk::DiskBus;
use crate::ids::{Epoch, Generation};
use crate::nic::Mac;
use crate::statistics::{DiskVerifyStatus, Statistics, VerifyStatus};

/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 1 << 20;

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

/// Reply to [`VmmRequest::Shape`]: all in which two machines must agree for one to run from the other's image. What is behind the
/// devices is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Serial ports, 0 to 4.
    pub serial_ports: u32,
    /// Whether there is a virtio console.
    pub console: bool,
    /// Disks, in the order of their places on the bus.
    #[serde(default)]
    pub disks: Vec<DiskShape>,
    /// CD-ROM drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdroms: Vec<CdromShape>,
    /// Network cards, in the order of their places on the bus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicShape>,
}

/// A network card in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicShape {
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// Pairs of queues.
    pub queues: u16,
    /// The guest may leave checksums and segmentation to it.
    pub offloads: bool,
    /// The MTU that the guest is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

/// A CD-ROM drive in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdromShape {
    /// Its name, which the guest sees as its serial number.
    pub name: String,
}

/// A disk in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// Its name, which the guest sees as its id.
    pub name: String,
    /// How the guest sees it.
    #[serde(default, skip_serializing_if = "DiskBus::is_default")]
    pub bus: DiskBus,
    /// Its queues, or its controller's.
    pub queues: u16,
    /// The guest can only read it.
    pub read_only: bool,
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
}

/// A network card in [`VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// Its name.
    pub name: String,
    /// Its address, as the machine is configured.
    pub mac: Mac,
    /// All of its configuration, as in [`crate::nic`].
    pub spec: String,
    /// What is behind it.
    pub backend: String,
    /// `up`: packets come and go. `down`: the machine has no authority to speak here (standby, handed over, fenced, switched off), and the port is down.
    pub link: String,
    /// Packets and bytes (frames, without the virtio header) that left, and that the guest was given.
    pub out_packets: u64,
    /// See `out_packets`.
    pub out_bytes: u64,
    /// See `out_packets`.
    pub in_packets: u64,
    /// See `out_packets`.
    pub in_bytes: u64,
    /// Packets that wait: for their commit, or for room behind the card.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Most bytes that may wait.
    pub held_limit: u64,
    /// Times that the bound was reached, and the guest had to wait or packets were dropped.
    pub bound_reached: u64,
    /// Packets that were dropped: reason and number.
    #[serde(default)]
    pub dropped: std::collections::BTreeMap<String, u64>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// A CD-ROM drive in [`VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdromStatus {
    /// Its name.
    pub name: String,
    /// What lies in it.
    pub file: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// The guest has locked it.
    pub locked: bool,
    /// The guest has opened its tray.
    pub open: bool,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// One disk in [`VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// Its base.
    pub file: String,
    /// All of its configuration, as in [`crate::disk`].
    #[serde(default)]
    pub spec: String,
    /// `direct`: unprotected, writes go to the base. `solo`: to slices that count at the guest's flush. `protected`: to slices that count with their
    /// checkpoint. `read-only`; `closed` on a standby.
    pub mode: String,
    /// How the base is read and written: `cache=none,aio=io_uring`; empty if it is not open.
    #[serde(default)]
    pub io: String,
    /// What a shared device itself does against an earlier owner's writes; empty: it is no device, or not open.
    #[serde(default)]
    pub fence: String,
    /// Its size, 0 while it is closed.
    pub size_bytes: u64,
    /// Bytes in slices that are not merged into the base.
    pub backlog_bytes: u64,
    /// Requests that are under way.
    pub in_flight: u64,
    /// Of these, those that wait until there is room.
    pub held: u64,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// One serial port in [`VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStatus {
    /// `com1` … `com4`.
    pub port: String,
    /// What is behind it: `board ADDRESS/DEVICE`, `file PATH`, `none`.
    pub backend: String,
    /// `connected`, `connecting`, `fenced`, `local`.
    pub link: String,
    /// Bytes that the guest has sent since it was first booted.
    pub tx_bytes: u64,
    /// Of these, acknowledged by the board.
    pub tx_acked: u64,
    /// Bytes not yet released by the gate.
    pub tx_held: u64,
    /// Bytes delivered into the guest's UART since it was first booted.
    pub rx_bytes: u64,
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

/// Reply to [`VmmRequest::MirrorBegin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorBegun {
    /// What each copy is to be told, as `understudy_disk::mirror::Begin`.
    pub begins: Vec<serde_json::Value>,
    /// Bytes that have to be looked at, in all.
    pub left: u64,
}

/// Reply to [`VmmRequest::MirrorRead`] and [`VmmRequest::MirrorLog`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorPieces {
    /// What was read. None: there is nothing (more) for now.
    pub pieces: Vec<MirrorPiece>,
    /// Bytes that the copies still lack, as far as is known.
    pub left: u64,
    /// Bytes that they were sent and have not said to be durable.
    pub flying: u64,
    /// The copies have everything up to these tags (as `understudy_disk::Tag`). One for each mirrored disk; only when that is so of all.
    #[serde(default)]
    pub in_step: Option<Vec<serde_json::Value>>,
}

/// A piece of a mirrored disk, or of its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorPiece {
    /// Place in [`Attached::mirrored`].
    pub disk: u16,
    /// What it is.
    pub what: MirrorWhat,
    /// Where its bytes begin in the disk arena.
    pub offset: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

/// What a [`MirrorPiece`] is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorWhat {
    /// A part of the disk: the bytes are its content; none: it is zeroes; 32 bytes with `hash`: its BLAKE3 hash.
    Part {
        /// Its number.
        number: u64,
        /// First byte.
        at: u64,
        /// Bytes of the disk.
        len: u64,
        /// The bytes are a hash.
        hash: bool,
    },
    /// A piece of a slice's log.
    Log {
        /// The slice's serial number.
        serial: u64,
        /// Under which generation it was written.
        generation: Generation,
        /// The disk's number for the epoch.
        epoch: Epoch,
        /// Where in the log.
        at: u64,
        /// The slice is closed, and this was the last of it: its tag, as `understudy_disk::Tag`.
        closed: Option<serde_json::Value>,
    },
}

/// What one copy says, in [`VmmRequest::MirrorDurable`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorDurable {
    /// Number of the last part that is durable.
    pub upto: u64,
    /// First byte and length of what differs.
    pub differing: Vec<(u64, u64)>,
}

/// A step of a comparison. Disks are numbered as in [`Attached::mirrored`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum DiskVerifyStep {
    /// Begin. Reply: the disks' names and sizes, a list of pairs.
    Begin,
    /// Hold a base still. Reply: where, as `understudy_disk::Tag`.
    Pin {
        /// Which.
        disk: u16,
    },
    /// The copy holds still here: hold at the same. Reply: that tag, or `null` when it is not committed here yet.
    PinAt {
        /// Which.
        disk: u16,
        /// Where, as `understudy_disk::Tag`.
        tag: serde_json::Value,
    },
    /// What to compare next. Reply: [`DiskQuestion`], or `null` at the end.
    Ask {
        /// Which.
        disk: u16,
    },
    /// What the copy says. Reply: `null`.
    Result {
        /// Which.
        disk: u16,
        /// [`DiskQuestion::number`].
        number: u64,
        /// Whether it is the same.
        same: bool,
    },
    /// Merging may go on. Reply: `null`.
    Unpin {
        /// Which.
        disk: u16,
    },
    /// Reply: [`DiskCompared`].
    Compared {
        /// Which.
        disk: u16,
    },
}

/// Reply to [`DiskVerifyStep::Ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskQuestion {
    /// Of the question.
    pub number: u64,
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// BLAKE3.
    pub hash: [u8; 32],
}

/// Reply to [`DiskVerifyStep::Compared`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCompared {
    /// Bytes compared.
    pub done: u64,
    /// Bytes in ranges that differ.
    pub differing: u64,
    /// First byte and length of the first of them.
    pub ranges: Vec<(u64, u64)>,
}

/// Reply to [`VmmRequest::SealDisks`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// What each mirrored disk is at the end of the epoch (as `understudy_disk::Tag`), in the order of [`Attached::mirrored`].
    pub tags: Vec<serde_json::Value>,
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

/// A request to a board service, e.g. `understudy-serial`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum BoardRequest {
    /// Reply: [`BoardStatus`].
    Status,
    /// End the service in order: nothing is uncertain afterwards. Reply: `null`, then the socket closes.
    Quit,
}

/// Reply to [`BoardRequest::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardStatus {
    /// The machine that it serves.
    pub machine: String,
    /// The device's name.
    pub device: String,
    /// What the line is, as on the command line: `tty:/dev/ttyS0,115200`.
    pub line: String,
    /// Whether the line is open. While it is not, output waits.
    pub line_open: bool,
    /// Address and port that sessions are accepted on.
    pub listen: String,
    /// Which run of the service this is.
    pub incarnation: u64,
    /// Highest generation seen; lower ones are refused.
    pub generation: Generation,
    /// The generation that booted the machine whose streams these are.
    pub life: Generation,
    /// Address of the owner's host, if one is attached.
    pub owner: Option<String>,
    /// Time since the owner was last heard, ms; `None` if none is attached.
    pub last_heard_ms: Option<u64>,
    /// Output bytes that the line has taken, since the machine's cold boot.
    pub applied: u64,
    /// Output bytes that wait for the line.
    pub pending: u64,
    /// Oldest input offset kept for the machine.
    pub input_base: u64,
    /// Input bytes read from the line, since the machine's cold boot.
    pub input_end: u64,
    /// Most input bytes kept.
    pub input_capacity: u64,
    /// Connections, attached or not.
    pub sessions: u64,
    /// Attaches agreed to since the service started.
    pub attaches: u64,
    /// Connections refused since the service started: stale generation, wrong key, ….
    pub refusals: u64,
    /// The newest events, oldest first, as sentences.
    pub events: Vec<String>,
}

/// A reply as it stands on the line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply<T> {
    /// Done; what was asked for.
    Ok(T),
    /// Not done; a sentence that says why and what to do.
    Error(String),
}

/// Why a control call failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing answers on the socket.
    #[error("cannot talk to {socket}: {source}")]
    Io {
        /// The socket's path.
        socket: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other side answered with something else than the protocol.
    #[error("{socket} answered something that is not a reply: {why}")]
    Garbled {
        /// The socket's path.
        socket: String,
        /// What was wrong.
        why: String,
    },
    /// The other side said no.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct ControlClient {
    socket: String,
    reader: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connect; every later call takes at most `timeout` for writing and for reading.
    pub fn connect(socket: impl AsRef<Path>, timeout: Duration) -> Result<Self, ControlError> {
        let name = socket.as_ref().display().to_string();
        let io_error = |source| ControlError::Io { socket: name.clone(), source };
        let stream = UnixStream::connect(socket.as_ref()).map_err(io_error)?;
        stream.set_read_timeout(Some(timeout)).map_err(io_error)?;
        stream.set_write_timeout(Some(timeout)).map_err(io_error)?;
        Ok(Self { reader: BufReader::new(stream), socket: name })
    }

    /// Change the timeout of later calls.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), ControlError> {
        let io_error = |source| ControlError::Io { socket: self.socket.clone(), source };
        self.reader.get_ref().set_read_timeout(Some(timeout)).map_err(io_error)?;
        self.reader.get_ref().set_write_timeout(Some(timeout)).map_err(io_error)
    }

    /// A handle whose `shutdown` ends a call that waits in another thread.
    pub fn stream(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Send one request and wait for its reply.
    pub fn call<Q: Serialize, R: DeserializeOwned>(&mut self, request: &Q) -> Result<R, ControlError> {
        let line = encode_line(request);
        let io_error = |source| ControlError::Io { socket: self.socket.clone(), source };
        self.reader.get_mut().write_all(&line).map_err(io_error)?;
        let reply = read_line(&mut self.reader).map_err(io_error)?;
        let Some(reply) = reply else {
            return Err(io_error(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")));
        };
        let garbled = |why: String| ControlError::Garbled { socket: self.socket.clone(), why };
        match serde_json::from_slice::<Reply<R>>(&reply).map_err(|e| garbled(e.to_string()))? {
            Reply::Ok(value) => Ok(value),
            Reply::Error(why) => Err(ControlError::Refused(why)),
        }
    }
}

/// Connect, call once, close.
pub fn call_once<Q: Serialize, R: DeserializeOwned>(
    socket: impl AsRef<Path>,
    request: &Q,
    timeout: Duration,
) -> Result<R, ControlError> {
    ControlClient::connect(socket, timeout)?.call(request)
}

/// One message as a line, newline included. (Types that serde_json cannot write are a bug of ours; they become an error
/// reply rather than a panic.)
pub fn encode_line<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message)
        .unwrap_or_else(|e| format!("{{\"error\":\"unwritable message: {e}\"}}").into_bytes());
    line.push(b'\n');
    line
}

/// Read one line of at most [`MAX_LINE`] bytes, without its newline; `None` at end of stream.
pub fn read_line(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = reader.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
    if n == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let kind = if n > MAX_LINE { io::ErrorKind::InvalidData } else { io::ErrorKind::UnexpectedEof };
        return Err(io::Error::new(kind, format!("a control line ended after {n} bytes without a newline")));
    }
    line.pop();
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
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
