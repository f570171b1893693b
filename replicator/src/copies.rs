//! This node's copies of a machine's mirrored disks: performs the receiver's steps on them.
//!
//! Which files they are is asked of the machine's VMM that stands by on this node: it has the configuration, and opens them itself when it is promoted.
//! They are open as long as a sender is connected.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use understudy_disk::mirror::{Applied, Begin, Content, Copy, CopyOptions, Item, LogPiece, PeerState, Range};
use understudy_disk::{Format, Limits, Tag, configured};
use understudy_protocol::control::{ControlClient, VmmRequest, VmmStatus};
use understudy_protocol::disk::DiskSpec;
use understudy_protocol::layout::Layout;

use crate::background::Background;
use crate::message::{DiskCheck, DiskChecked, Flushed, Log, Part, PartContent};

/// The disks of this node's VMM.
///
/// # Errors
/// A sentence: it does not answer, or what it says is not understood.
pub fn local_disks(layout: &Layout, timeout: Duration) -> Result<Vec<DiskSpec>, String> {
    let unknown = |e: String| format!("the machine's disks on this node are not known: {e}");
    let client = ControlClient::connect(layout.vmm_socket(), timeout).map_err(|e| unknown(e.to_string()));
    let status = client
        .and_then(|mut client| client.call::<_, VmmStatus>(&VmmRequest::Status).map_err(|e| unknown(e.to_string())))?;
    status.disks.iter().map(|disk| disk.spec.parse().map_err(|e| unknown(format!("{e}")))).collect()
}

/// One copy.
struct Open {
    name: String,
    copy: Arc<Copy>,
    /// It is being brought into step.
    syncing: bool,
    /// Last part that was applied, and what differed since that was told last.
    upto: u64,
    differing: Vec<Range>,
}

/// See the module.
#[derive(Default)]
pub struct Copies {
    open: Vec<Open>,
    /// Makes copies durable.
    flusher: Background,
    /// Does a comparison's steps.
    checker: Background,
    /// What was sealed last.
    sealed: Vec<Tag>,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.open.iter().map(|open| &open.name)).finish()
    }
}

impl Copies {
    /// Open the copies of these disks. What was open is closed before.
    ///
    /// # Errors
    /// A sentence that names the disk; none is open then.
    pub fn open(&mut self, machine: &str, node: &str, names: &[String], specs: &[DiskSpec]) -> Result<(), String> {
        self.close();
        let open = |name: &String| {
            let spec = specs.iter().find(|spec| spec.name == *name);
            let spec = spec.ok_or_else(|| {
                format!("the machine has a disk {name} and its standby on {node} has none: configure both alike")
            })?;
            if !spec.mirrored {
                return Err(format!("disk {name} is mirrored, and on {node} it is shared: configure both alike"));
            }
            open_copy(machine, node, spec).map_err(|why| format!("disk {name} on {node}: {why}"))
        };
        self.open = names.iter().map(open).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// How they are, for the sender.
    ///
    /// # Errors
    /// A sentence.
    pub fn states(&self) -> Result<Vec<PeerState>, String> {
        self.open.iter().map(|open| open.copy.state().map_err(|e| open.say(e))).collect()
    }

    /// Nothing writes to them any more when this returns; what was not sealed is thrown away.
    pub fn close(&mut self) {
        self.flusher.finish();
        self.checker.finish();
        self.sealed.clear();
        for open in self.open.drain(..) {
            open.copy.abandon();
        }
    }

    /// The sender begins to bring them into step.
    ///
    /// # Errors
    /// A sentence.
    pub fn begin(&mut self, begins: &[Begin]) -> Result<(), String> {
        for (open, begin) in self.open.iter_mut().zip(begins) {
            open.copy.begin(begin).map_err(|e| open.say(e))?;
            (open.syncing, open.upto, open.differing) = (true, 0, Vec::new());
        }
        Ok(())
    }

    fn get(&mut self, disk: u16) -> Result<&mut Open, String> {
        let open = self.open.get_mut(usize::from(disk));
        open.ok_or_else(|| format!("the sender speaks of a disk number {disk} that is not open here"))
    }

    /// A part of a disk.
    ///
    /// # Errors
    /// A sentence.
    pub fn apply(&mut self, part: &Part<'_>) -> Result<(), String> {
        let open = self.get(part.disk)?;
        let content = match part.content {
            PartContent::Data(bytes) => Content::Data(bytes.to_vec()),
            PartContent::Zero => Content::Zero,
            PartContent::Hash(hash) => Content::Hash(hash),
        };
        let item = Item { number: part.number, at: part.at, len: part.len, content };
        if open.copy.apply(&item).map_err(|e| open.say(e))? == Applied::Differs {
            open.differing.push(Range { at: part.at, len: part.len });
        }
        open.upto = part.number;
        Ok(())
    }

    /// Make durable what was applied, in a thread, and then call `done`.
    pub fn flush(&mut self, done: impl FnOnce(Result<Vec<Flushed>, String>) + Send + 'static) {
        let take = |open: &mut Open| {
            let flushed = Flushed { upto: open.upto, differing: std::mem::take(&mut open.differing) };
            (open.name.clone(), open.syncing.then(|| open.copy.clone()), flushed)
        };
        let all: Vec<_> = self.open.iter_mut().map(take).collect();
        let flush = |(name, copy, flushed): (String, Option<Arc<Copy>>, Flushed)| {
            copy.map_or(Ok(()), |copy| copy.flush()).map(|()| flushed).map_err(|e| format!("disk {name}: {e}"))
        };
        self.flusher.run(move || all.into_iter().map(flush).collect(), done);
    }

    /// A step of a comparison with the primary, in a thread; then call `done` with the answer, if there is one. Steps are done one after the other.
    ///
    /// # Errors
    /// A sentence: there is no such disk.
    pub fn check(&mut self, check: DiskCheck, done: impl FnOnce(DiskChecked) + Send + 'static) -> Result<(), String> {
        let copy = self.get(check.disk())?.copy.clone();
        let told = move |answer: Option<DiskChecked>| answer.map_or((), done);
        // (A copy that is let go and then held again is held in the end.)
        self.checker.run(move || step(&copy, check), told);
        Ok(())
    }

    /// They are complete up to these tags.
    ///
    /// # Errors
    /// A sentence.
    pub fn into_step(&mut self, tags: &[Tag]) -> Result<(), String> {
        for (open, tag) in self.open.iter_mut().zip(tags) {
            open.copy.into_step(*tag).map_err(|e| open.say(e))?;
            open.syncing = false;
        }
        Ok(())
    }

    /// A piece of a slice's log.
    ///
    /// # Errors
    /// A sentence.
    pub fn append(&mut self, log: &Log<'_>) -> Result<(), String> {
        let open = self.get(log.disk)?;
        let piece = LogPiece { slice: log.slice, offset: log.offset, bytes: log.bytes.to_vec(), closed: log.closed };
        open.copy.append(&piece).map_err(|e| open.say(e))
    }

    /// The slices up to these tags are durable when this returns.
    ///
    /// # Errors
    /// A sentence.
    pub fn seal(&mut self, tags: &[Tag]) -> Result<(), String> {
        for (open, tag) in self.open.iter().zip(tags) {
            open.copy.seal(*tag).map_err(|e| open.say(e))?;
        }
        self.sealed = tags.to_vec();
        Ok(())
    }

    /// What was sealed last is committed when this returns.
    ///
    /// # Errors
    /// A sentence.
    pub fn commit(&mut self) -> Result<(), String> {
        for (open, tag) in self.open.iter().zip(&self.sealed) {
            open.copy.commit(*tag).map_err(|e| open.say(e))?;
        }
        Ok(())
    }
}

fn step(copy: &Copy, check: DiskCheck) -> Option<DiskChecked> {
    let done = match check {
        DiskCheck::Pin { disk, tag } => copy.pin(tag).map(|at| DiskChecked::Pinned { disk, at }),
        DiskCheck::Compare { disk, number, range, hash } => {
            let item = Item { number, at: range.at, len: range.len, content: Content::Hash(hash) };
            copy.compare(&item).map(|same| DiskChecked::Compared { disk, number, same })
        }
        DiskCheck::Unpin { .. } => {
            copy.unpin();
            return None;
        }
    };
    Some(done.unwrap_or_else(|e| DiskChecked::Failed { disk: check.disk(), why: e.to_string() }))
}

impl Open {
    fn say(&self, why: impl std::fmt::Display) -> String {
        format!("disk {}: {why}", self.name)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.close();
    }
}

fn open_copy(machine: &str, node: &str, spec: &DiskSpec) -> Result<Open, String> {
    let format = configured::format(spec);
    let path = Path::new(&spec.file);
    if format == Format::Raw && !path.exists() {
        // The first copy fills it.
        File::create_new(path).map_err(|e| format!("cannot create {}: {e}", spec.file))?;
    }
    let opened = configured::open_base(spec, node).and_then(|base| {
        Copy::open_merging(CopyOptions {
            base,
            format,
            directory: configured::open_slices(spec)?,
            machine: machine.to_owned(),
            node: node.to_owned(),
            limits: Limits::default(),
        })
    });
    let copy = Arc::new(opened.map_err(|e| e.to_string())?);
    Ok(Open { name: spec.name.clone(), copy, syncing: false, upto: 0, differing: Vec::new() })
}
