//! The control socket: one thread a connection, one JSON object a line (see [`understudy_protocol::control`]).
//!
//! A connection that attached owns the replication session; when it ends, for whatever reason, the session is dropped.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use understudy_protocol::control::{Gate, OutputHeld, Reply, VmmRequest, encode_line, read_line};

use crate::core::Event;
use crate::machine::Machine;
use crate::session::{CutRequest, Session, SharedArena};
use crate::storage::verify::DiskVerify;

/// More connections than any use needs; the next ones are closed at once.
const MAX_CONNECTIONS: usize = 64;

/// Listen on `socket` (0600, replacing a dead one) and serve until the process ends.
pub fn serve(socket: PathBuf, machine: Arc<Machine>, arena: SharedArena) -> Result<()> {
    if socket.exists() {
        // The caller holds the machine's lock: whoever made this socket is gone.
        fs::remove_file(&socket).with_context(|| format!("cannot remove the old socket {}", socket.display()))?;
    }
    let listener = bind_private(&socket)?;
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new()
        .name("control".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                if open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
                    continue;
                }
                open.fetch_add(1, Ordering::Relaxed);
                let (machine, arena, open) = (machine.clone(), arena.clone(), open.clone());
                let spawned =
                    std::thread::Builder::new().name("client".into()).stack_size(512 * 1024).spawn(move || {
                        Connection { machine, arena, session: None, verify: DiskVerify::default() }.serve(stream);
                        open.fetch_sub(1, Ordering::Relaxed);
                    });
                if let Err(e) = spawned {
                    eprintln!("warning: cannot serve a control connection: {e}");
                }
            }
        })
        .context("cannot start the control thread")?;
    Ok(())
}

/// Bind under a private name first, so that the socket never exists with other permissions than 0600.
fn bind_private(socket: &Path) -> Result<UnixListener> {
    let temporary = socket.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)
        .with_context(|| format!("cannot create the control socket {}", socket.display()))?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&temporary, socket))
        .with_context(|| format!("cannot publish the control socket {}", socket.display()))?;
    Ok(listener)
}

struct Connection {
    machine: Arc<Machine>,
    arena: SharedArena,
    session: Option<Session>,
    verify: DiskVerify,
}

impl Connection {
    fn serve(mut self, stream: UnixStream) {
        let Ok(mut writer) = stream.try_clone() else { return };
        let mut reader = BufReader::new(stream);
        loop {
            // A replicator that hangs must not stop the guest for longer than this; then its session ends.
            let patience = self.session.as_ref().and_then(Session::patience);
            if reader.get_ref().set_read_timeout(patience).is_err() {
                break;
            }
            let line = match read_line(&mut reader) {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(e) => {
                    if patience.is_some() {
                        eprintln!(
                            "warning: the replicator does not go on with a cut ({e}); its session ends, the guest runs on"
                        );
                    }
                    break;
                }
            };
            let (reply, quit) = match serde_json::from_slice::<VmmRequest>(&line) {
                Ok(VmmRequest::Quit) => (encode_line(&Reply::Ok(())), true),
                Ok(request) => (self.answer(request).unwrap_or_else(|e| refuse(&e)), false),
                Err(e) => (encode_line(&Reply::<()>::Error(format!("this is not a request: {e}"))), false),
            };
            let written = writer.write_all(&reply);
            understudy_protocol::urgent::pace();
            if quit {
                self.machine.core.tell(Event::Quit);
            }
            if quit || written.is_err() {
                break;
            }
        }
    }

    fn answer(&mut self, request: VmmRequest) -> Result<Vec<u8>> {
        let machine = &self.machine;
        if matches!(
            request,
            VmmRequest::Attach
                | VmmRequest::AttachToMigrate
                | VmmRequest::AwaitOutput { .. }
                | VmmRequest::Promote { .. }
        ) {
            // It comes to stop the guest, or is waited for by whoever lets outputs go; a takeover is waited for by everybody.
            understudy_protocol::urgent::this_thread();
        }
        Ok(match request {
            VmmRequest::Status => ok(machine.status()),
            VmmRequest::Pause => ok(machine.pause()?),
            VmmRequest::Resume => ok(machine.resume()?),
            VmmRequest::PowerButton => ok(machine.power_button()?),
            VmmRequest::Quit => ok(()),
            VmmRequest::Promote { generation, from } => ok(machine.promote(generation, &from, Gate::Hold)?),
            VmmRequest::Save { dir } => ok(machine.save(Path::new(&dir))?),
            VmmRequest::Attach | VmmRequest::AttachToMigrate => {
                if self.session.is_some() {
                    bail!("this connection is attached already");
                }
                let attach = match request {
                    VmmRequest::AttachToMigrate => Session::attach_to_migrate,
                    _ => Session::attach,
                };
                let (session, attached) = attach(machine.clone(), self.arena.clone())?;
                self.session = Some(session);
                ok(attached)
            }
            VmmRequest::DirtyLogStart => ok(self.session()?.dirty_log_start()?),
            VmmRequest::Harvest => ok(self.session()?.harvest()?),
            VmmRequest::Precopy { epoch } => ok(self.session()?.precopy(epoch)?),
            VmmRequest::Shape => ok(machine.shape()),
            VmmRequest::Positions => ok(machine.positions()?),
            VmmRequest::SetCapture { strategy } => {
                machine.capturing().strategy = strategy;
                ok(())
            }
            VmmRequest::Throttle { percent } => {
                if !(1..=100).contains(&percent) {
                    bail!("the vCPUs can run for 1 to 100 percent of the time, not for {percent}");
                }
                match &mut self.session {
                    Some(session) => ok(session.throttle(percent)?),
                    // By a person: until a person says otherwise.
                    None => ok(machine.vcpus.throttle(percent)?),
                }
            }
            VmmRequest::ResizeDisk { disk, bytes } => ok(machine.resize_disk(&disk, bytes)?),
            VmmRequest::Eject { drive, force } => ok(machine.eject(&drive, force)?),
            VmmRequest::Insert { drive, file, force } => ok(machine.insert(&drive, &file, force)?),
            VmmRequest::AwaitOutput { seen, timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms.min(10_000));
                ok(OutputHeld { number: machine.core.await_output(seen, timeout) })
            }
            VmmRequest::Cut { epoch, arm, last, again } => {
                ok(self.session()?.cut(CutRequest { epoch, arm, last, again })?)
            }
            VmmRequest::CutContinue => ok(self.session()?.cut_continue()?),
            VmmRequest::VerifyDisks { step } => encode_line(&Reply::Ok(self.verify.step(&machine.storage, step)?)),
            VmmRequest::MirrorBegin { copies } => ok(self.session()?.mirror_begin(&copies)?),
            VmmRequest::MirrorRead => ok(self.session()?.mirrors()?.read()?),
            VmmRequest::MirrorDurable { copies } => ok(self.session()?.mirrors()?.durable(&copies)?),
            VmmRequest::MirrorDone => ok(self.session()?.mirrors()?.done()?),
            VmmRequest::MirrorLog => ok(self.session()?.mirrors()?.log()?),
            VmmRequest::SealDisks { epoch } => ok(self.session()?.seal_disks(epoch)?),
            VmmRequest::Committed { epoch } => ok(self.session()?.committed(epoch)?),
            VmmRequest::GateOpen => match &mut self.session {
                Some(session) => ok(session.gate_open()?),
                // By a person, for a machine that no cluster protects.
                None => ok(machine.open_gate_by_hand()?),
            },
        })
    }

    fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().context("attach first: this request belongs to a replication session")
    }
}

fn ok<T: Serialize>(value: T) -> Vec<u8> {
    encode_line(&Reply::Ok(value))
}

fn refuse(e: &anyhow::Error) -> Vec<u8> {
    encode_line(&Reply::<()>::Error(format!("{e:#}")))
}
