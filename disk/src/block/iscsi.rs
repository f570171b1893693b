//! A disk on an iSCSI target, without any set-up of the host: the initiator is in this process ([`understudy_hostio::iscsi`]).
//!
//! Requests go past every cache of this node. While the target does not answer they wait, and [`Block::trouble`] says since when; they are made again on the next
//! connection, which changes nothing (see there). The device's persistent reservations are this connection's own, so a frozen process on the same node is kept
//! out as one on another.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Weak};
use std::time::Duration;

use understudy_hostio::iscsi::{Command, Data, Patience, Session, Status, Target, What};
use understudy_hostio::{Buffer, Op};
use understudy_protocol::iscsi::Url;

use super::{Block, Ended, Guard, How, SECTOR, admit, scsi};
use crate::error::{Doing, Error, Result};
use crate::reservation::{Held, Key, Reservations, parse_held, parse_keys};

/// Most bytes of one command, if the target allows as much.
const MOST: u64 = 1 << 20;
/// Most bytes of one WRITE SAME, if the target says nothing.
const MOST_SAME: u64 = 64 << 20;

/// A disk on an iSCSI target.
pub struct Iscsi {
    inner: Arc<Inner>,
    read_only: bool,
    size: AtomicU64,
    most: u64,
    most_same: u64,
    unmaps: bool,
    /// The target knows no WRITE SAME: zeroes are written.
    no_same: AtomicBool,
}

struct Inner {
    name: String,
    session: Session,
}

/// The user and the secret of CHAP from a file: each on a line of its own. Only its owner may read it.
///
/// # Errors
/// It is not there, others may read it, it has no two lines.
pub fn read_chap(path: &Path) -> Result<(String, String)> {
    use std::os::unix::fs::PermissionsExt;
    let doing = || format!("reading user and secret of CHAP from {}", path.display());
    let mode = std::fs::metadata(path).doing(doing)?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Error::Refused(format!("{} can be read by others than its owner: chmod 600 {0}", path.display())));
    }
    let text = std::fs::read_to_string(path).doing(doing)?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    match (lines.next(), lines.next(), lines.next()) {
        (Some(user), Some(secret), None) => Ok((user.to_owned(), secret.to_owned())),
        _ => Err(Error::Refused(format!("{} must have two lines: CHAP's user, and its secret", path.display()))),
    }
}

/// This node's initiator name: the host's own, if it has one.
fn initiator(node: &str) -> String {
    let own = std::fs::read_to_string("/etc/iscsi/initiatorname.iscsi").unwrap_or_default();
    let named = own.lines().find_map(|line| line.trim().strip_prefix("InitiatorName=")).map(str::trim);
    match named {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => {
            let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
            let node: String = node.to_ascii_lowercase().chars().map(|c| if good(c) { c } else { '-' }).collect();
            format!("iqn.2026-01.local.understudy:{node}")
        }
    }
}

impl Iscsi {
    /// Log in to the target of this address, from this node.
    ///
    /// # Errors
    /// libiscsi is missing; the target refuses or is not there; its logical unit is no disk with blocks of 512 bytes.
    pub fn open(
        url: &Url,
        node: &str,
        chap: Option<(String, String)>,
        read_only: bool,
        patience: Patience,
    ) -> Result<Self> {
        let name = url.to_string();
        let mut session = [0; 4];
        getrandom::fill(&mut session)
            .map_err(|e| Error::io("drawing a number for a session", std::io::Error::other(e)))?;
        let target = Target {
            portal: url.portal(),
            name: url.target.clone(),
            lun: url.lun,
            initiator: initiator(node),
            // 24 bits; another process is another session.
            session: u32::from_be_bytes(session) & 0xff_ffff,
            chap,
        };
        let initiator = target.initiator.clone();
        let session = Session::start(target, patience)
            .map_err(|why| Error::Refused(format!("{name} cannot be attached as {initiator}: {why}")))?;
        let inner = Arc::new(Inner { name, session });
        let capacity = inner.capacity()?;
        if u64::from(capacity.block) != SECTOR {
            return Err(Error::Refused(format!(
                "{} has blocks of {} bytes; only blocks of {SECTOR} are possible here",
                inner.name, capacity.block
            )));
        }
        let mut page = Buffer::new(64);
        page.fill(0);
        let (transfer, same) = match inner.execute(scsi::block_limits(64), Data::In(page), true) {
            Ok((Data::In(page), _)) => scsi::parse_block_limits(&page),
            _ => (0, 0),
        };
        let bytes =
            |blocks: u64, default: u64| if blocks == 0 { default } else { blocks.saturating_mul(SECTOR).min(default) };
        Ok(Iscsi {
            read_only,
            size: AtomicU64::new(capacity.blocks * SECTOR),
            most: bytes(transfer.into(), MOST),
            most_same: bytes(same, MOST_SAME),
            unmaps: capacity.unmaps_to_zeroes,
            no_same: AtomicBool::new(false),
            inner,
        })
    }

    fn may_write(&self, at: u64, len: u64) -> Result<()> {
        admit(self, at, len)?;
        if self.read_only { Err(Error::ReadOnly { disk: self.inner.name.clone() }) } else { Ok(()) }
    }
}

/// Pieces of a range: first byte and length of each.
fn pieces(at: u64, len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(most)).map(move |i| (at + i * most, most.min(len - i * most)))
}

/// Blocks of so many bytes; every request is cut to fewer.
fn blocks(len: u64) -> u32 {
    u32::try_from(len / SECTOR).unwrap_or(u32::MAX)
}

impl Inner {
    /// One command, and wait for its end. Returns its data and how much of it was not used.
    fn execute(&self, cdb: Vec<u8>, data: Data, urgent: bool) -> Result<(Data, usize)> {
        let operation = cdb.first().copied().unwrap_or(0);
        let (status, data) = self.ask(What::Cdb(cdb), data, urgent);
        judge(&self.name, operation, status).map(|residual| (data, residual))
    }

    fn ask(&self, what: What, data: Data, urgent: bool) -> (Status, Data) {
        let (sender, ended) = sync_channel(1);
        let done = Box::new(move |status, data| drop(sender.send((status, data))));
        self.session.send(Command { what, data, urgent, done });
        ended.recv().unwrap_or((Status::Ended, Data::None))
    }

    fn reset_unit(&self) -> Result<()> {
        match self.ask(What::ResetUnit, Data::None, true).0 {
            Status::Good { .. } => Ok(()),
            other => Err(Error::Io {
                doing: format!("ending what an earlier owner of {} has under way (LOGICAL UNIT RESET)", self.name),
                source: std::io::Error::other(format!("{other:?}")),
            }),
        }
    }

    fn capacity(&self) -> Result<scsi::Capacity> {
        let (data, residual) = self.execute(scsi::read_capacity(), Data::In(Buffer::new(32)), true)?;
        let Data::In(data) = data else { return Err(self.nonsense("its capacity")) };
        scsi::parse_capacity(&data[..data.len() - residual.min(32)]).ok_or_else(|| self.nonsense("its capacity"))
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::Io {
            doing: format!("asking {} for {what}", self.name),
            source: std::io::Error::other("its answer makes no sense"),
        }
    }

    fn reserve_in<T>(&self, action: u8, parse: impl Fn(&[u8]) -> std::result::Result<T, &'static str>) -> Result<T> {
        const LEN: usize = 8 << 10;
        let (data, residual) = self.execute(scsi::reserve_in(action, LEN), Data::In(Buffer::new(LEN)), true)?;
        let Data::In(data) = data else { return Err(self.nonsense("its reservations")) };
        parse(&data[..LEN - residual.min(LEN)]).map_err(|why| Error::Io {
            doing: format!("reading the reservations of {}", self.name),
            source: std::io::Error::other(why),
        })
    }

    fn reserve_out(&self, action: u8, key: u64, action_key: u64, aptpl: bool) -> Result<()> {
        let (cdb, parameters) = scsi::reserve_out(action, key, action_key, aptpl);
        self.execute(cdb, Data::Out(Buffer::copy(&parameters)), true).map(|_| ())
    }
}

fn judge(name: &str, operation: u8, status: Status) -> Result<usize> {
    let doing = || format!("a SCSI command ({operation:#04x}) to {name}");
    match status {
        Status::Good { residual } => Ok(residual),
        Status::Conflict => Err(Error::Preempted { disk: name.to_owned() }),
        // SPACE ALLOCATION FAILED WRITE PROTECT: a thin logical unit.
        Status::Check { key: 7, ascq: 0x2707 } => Err(Error::Full { doing: doing() }),
        Status::Check { key: 7, .. } => Err(Error::ReadOnly { disk: name.to_owned() }),
        Status::Check { key, ascq } => {
            let kind = if key == 5 { std::io::ErrorKind::Unsupported } else { std::io::ErrorKind::Other };
            Err(Error::Io { doing: doing(), source: std::io::Error::new(kind, scsi::sense(key, ascq)) })
        }
        Status::Other(other) => {
            Err(Error::Io { doing: doing(), source: std::io::Error::other(format!("it ended with status {other:#x}")) })
        }
        Status::Ended => Err(Error::Refused(format!("{}: the session is being ended", doing()))),
    }
}

fn is_unsupported(e: &Error) -> bool {
    matches!(e, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::Unsupported)
}

impl Block for Iscsi {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        admit(self, at, to.len() as u64)?;
        for (begin, len) in pieces(at, to.len() as u64, self.most) {
            let (data, residual) = self.inner.execute(
                scsi::read(begin / SECTOR, blocks(len)),
                Data::In(Buffer::new(len as usize)),
                false,
            )?;
            match data {
                Data::In(data) if residual == 0 => to[(begin - at) as usize..][..len as usize].copy_from_slice(&data),
                _ => return Err(self.inner.nonsense("a block")),
            }
        }
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.may_write(at, from.len() as u64)?;
        for (begin, len) in pieces(at, from.len() as u64, self.most) {
            let data = Buffer::copy(&from[(begin - at) as usize..][..len as usize]);
            self.inner.execute(scsi::write(begin / SECTOR, blocks(len)), Data::Out(data), false)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.may_write(at, len)?;
        let mut done = 0;
        // What is unmapped must read as zeroes on every node: UNMAP promises that only where the target says so, WRITE SAME always.
        if !self.no_same.load(Ordering::Relaxed) {
            for (begin, len) in pieces(at, len, self.most_same) {
                let mut zeroes = Buffer::new(SECTOR as usize);
                zeroes.fill(0);
                let cdb = scsi::write_same(begin / SECTOR, blocks(len), unmap && self.unmaps);
                match self.inner.execute(cdb, Data::Out(zeroes), false) {
                    Ok(_) => done += len,
                    Err(e) if is_unsupported(&e) => {
                        self.no_same.store(true, Ordering::Relaxed);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        for (begin, len) in pieces(at + done, len - done, self.most) {
            let mut zeroes = Buffer::new(len as usize);
            zeroes.fill(0);
            self.inner.execute(scsi::write(begin / SECTOR, blocks(len)), Data::Out(zeroes), false)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        match self.inner.execute(scsi::synchronize_cache(), Data::None, false) {
            // A target without a cache need not know it.
            Err(e) if is_unsupported(&e) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.may_write(0, 0)?;
        let is = self.inner.capacity()?.blocks * SECTOR;
        if is < size {
            return Err(Error::Refused(format!(
                "{} has {is} bytes; enlarge the logical unit at its target first, then resize the disk to at most that",
                self.inner.name
            )));
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn take_charge(&self) -> Result<()> {
        // Nothing is cached on this side.
        self.may_write(0, 0)
    }

    fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        let (write, at, len) = match &op {
            Op::Read { at, to } => (false, *at, to.len() as u64),
            Op::Write { at, from } => (true, *at, from.len() as u64),
        };
        if len == 0 || len > self.most || admit(self, at, len).is_err() || write && self.read_only {
            return Some((op, ended));
        }
        let (cdb, data) = match op {
            Op::Read { to, .. } => (scsi::read(at / SECTOR, blocks(len)), Data::In(to)),
            Op::Write { from, .. } => (scsi::write(at / SECTOR, blocks(len)), Data::Out(from)),
        };
        let inner = self.inner.clone();
        let operation = cdb[0];
        let done = Box::new(move |status, data| {
            let result = judge(&inner.name, operation, status).and_then(|residual| match data {
                Data::In(buffer) | Data::Out(buffer) if residual == 0 => Ok(buffer),
                _ => Err(inner.nonsense("a block")),
            });
            ended(result);
        });
        self.inner.session.send(Command { what: What::Cdb(cdb), data, urgent: false, done });
        None
    }

    fn begins(&self, _write: bool) -> bool {
        true
    }

    fn how(&self) -> How {
        How { io: "cache=none,aio=libiscsi".into(), note: None }
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        // A target without them says so.
        (!self.read_only && self.inner.keys().is_ok()).then(|| self.inner.clone() as Arc<dyn Reservations>)
    }

    fn shared_device(&self) -> bool {
        true
    }

    fn guard(&self, check: Guard) {
        let inner = Arc::downgrade(&self.inner);
        self.inner.session.guard(Arc::new(move |connection| {
            let (inner, check) = (inner.clone(), check.clone());
            let looked_after = std::thread::Builder::new()
                .name("disk-guard".into())
                .spawn(move || look_after(&inner, connection, &check));
            // Without it nothing is written: the status says that it waits.
            drop(looked_after);
        }));
    }

    fn trouble(&self) -> Option<String> {
        let (since, why) = self.inner.session.trouble()?;
        Some(format!(
            "{} has not been reachable for {} s ({why}): the guest's requests wait, nothing is lost; see to the target and the network",
            self.inner.name,
            since.as_secs()
        ))
    }
}

/// There is a new connection: are we still registered?
fn look_after(inner: &Weak<Inner>, connection: u64, check: &Guard) {
    while let Some(inner) = inner.upgrade() {
        if inner.session.connection() != connection {
            // It is lost again; the next one has a call of its own.
            return;
        }
        match check() {
            Ok(()) => return inner.session.admit(connection),
            // The directory of slices may be gone for a while, as the target was.
            Err(e) if matches!(e, Error::Io { .. } | Error::Full { .. }) => {
                eprintln!("{}: it is connected again, but whose it is cannot be seen: {e}; trying again", inner.name);
                drop(inner);
                std::thread::sleep(Duration::from_secs(1));
            }
            Err(e) => {
                eprintln!("{}: {e}; nothing is written any more", inner.name);
                return inner.session.refuse();
            }
        }
    }
}

impl Reservations for Inner {
    fn keys(&self) -> Result<Vec<Key>> {
        self.reserve_in(scsi::READ_KEYS, parse_keys)
    }
    fn held(&self) -> Result<Option<Held>> {
        self.reserve_in(scsi::READ_RESERVATION, parse_held)
    }
    fn register(&self, key: Key) -> Result<bool> {
        match self.reserve_out(scsi::REGISTER_AND_IGNORE, 0, key.0, true) {
            // It cannot keep registrations beyond a loss of power.
            Err(e) if is_unsupported(&e) => {
                self.reserve_out(scsi::REGISTER_AND_IGNORE, 0, key.0, false).map(|()| false)
            }
            other => other.map(|()| true),
        }
    }
    fn reserve(&self, key: Key) -> Result<()> {
        self.reserve_out(scsi::RESERVE, key.0, 0, false)
    }
    fn preempt_and_abort(&self, key: Key, other: Key) -> Result<()> {
        match self.reserve_out(scsi::PREEMPT_AND_ABORT, key.0, other.0, false) {
            // A target that has only half of it (tgt) does the other half when it is asked for it.
            Err(e) if is_unsupported(&e) => {
                self.reserve_out(scsi::PREEMPT, key.0, other.0, false)?;
                self.reset_unit()
            }
            other => other,
        }
    }
    fn unregister(&self, _: Key) -> Result<()> {
        if self.session.trouble().is_some() {
            // It would wait for the target. A key that stays is preempted by the next owner.
            return Ok(());
        }
        let (cdb, parameters) = scsi::reserve_out(scsi::REGISTER_AND_IGNORE, 0, 0, false);
        let (sender, ended) = sync_channel(1);
        let done = Box::new(move |status, _| {
            // Whoever waited may have gone.
            let _ = sender.send(status);
        });
        let data = Data::Out(Buffer::copy(&parameters));
        self.session.send(Command { what: What::Cdb(cdb), data, urgent: true, done });
        // Nor does a target that falls silent now hold up who lets go.
        match ended.recv_timeout(Duration::from_secs(3)) {
            Ok(status) => judge(&self.name, 0x5f, status).map(drop),
            Err(_) => Ok(()),
        }
    }
}
