//! The lab VM's agent: runs what the host asks for, see [`super::channel`].

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use understudy_protocol::control::read_line;

use super::channel::{AGENT_PORT, ExecRequest, Kind, read_frame, write_frame};

/// How long output may still come from what a finished command left running in the background.
const LATE_OUTPUT: Duration = Duration::from_secs(2);

/// Serve for ever.
pub fn serve(token: &str) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", AGENT_PORT)).context("listening for the host")?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let token = token.to_string();
        thread::spawn(move || {
            if let Err(e) = session(stream, &token) {
                eprintln!("vm-agent: {e:#}");
            }
        });
    }
    Ok(())
}

fn session(stream: TcpStream, token: &str) -> Result<()> {
    let _ = stream.set_nodelay(true);
    let mut reader = BufReader::new(stream.try_clone()?);
    let Some(line) = read_line(&mut reader)? else { return Ok(()) };
    let request: ExecRequest = serde_json::from_slice(&line).context("reading a request")?;
    let to_host = Arc::new(Mutex::new(stream));
    let fail = |text: &str, code: i32| -> Result<()> {
        send(&to_host, Kind::Stderr, format!("lab VM: {text}\n").as_bytes());
        send(&to_host, Kind::Exit, &code.to_le_bytes());
        Ok(())
    };
    if request.token != token {
        return fail("wrong token: this port belongs to another user's lab VM", 126);
    }
    let Some(program) = request.argv.first() else {
        send(&to_host, Kind::Exit, &0i32.to_le_bytes());
        return Ok(());
    };
    let mut command = Command::new(program);
    command.args(&request.argv[1..]).envs(request.env.iter().map(|(k, v)| (k, v)));
    if let Some(dir) = &request.cwd {
        command.current_dir(dir);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return fail(&format!("cannot run {program}: {e}"), 127),
    };
    let code = relay(&mut child, reader, &to_host);
    send(&to_host, Kind::Exit, &code.to_le_bytes());
    if let Ok(stream) = to_host.lock() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    Ok(())
}

fn relay(child: &mut Child, mut from_host: BufReader<TcpStream>, to_host: &Arc<Mutex<TcpStream>>) -> i32 {
    let (done_tx, done_rx) = mpsc::channel::<()>();
    let pumps: [(Option<Box<dyn Read + Send>>, Kind); 2] = [
        (child.stdout.take().map(|p| Box::new(p) as Box<dyn Read + Send>), Kind::Stdout),
        (child.stderr.take().map(|p| Box::new(p) as Box<dyn Read + Send>), Kind::Stderr),
    ];
    for (pipe, kind) in pumps {
        let (Some(mut pipe), to_host, done) = (pipe, to_host.clone(), done_tx.clone()) else { continue };
        thread::spawn(move || {
            let mut buffer = vec![0; 32 * 1024];
            while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                send(&to_host, kind, &buffer[..n]);
            }
            drop(done);
        });
    }
    drop(done_tx);
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let mut stdin = child.stdin.take();
    thread::spawn(move || {
        loop {
            match read_frame(&mut from_host) {
                Ok(Some((Kind::Stdin, data))) if data.is_empty() => stdin = None,
                Ok(Some((Kind::Stdin, data))) => {
                    if let Some(pipe) = &mut stdin {
                        // A command that does not read its input is its own business.
                        let _ = pipe.write_all(&data);
                    }
                }
                // The host is gone (or, after the last frame, has hung up on purpose: then the group is gone too).
                _ => {
                    let _ = killpg(group, Signal::SIGKILL);
                    return;
                }
            }
        }
    });
    let code = match child.wait() {
        Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(_) => 126,
    };
    // Both pumps end when the pipes close; whoever still holds one may not hold up the answer.
    let _ = done_rx.recv_timeout(LATE_OUTPUT);
    code
}

fn send(to_host: &Mutex<TcpStream>, kind: Kind, data: &[u8]) {
    // A host that has hung up is noticed by the reading side, which ends the command.
    if let Ok(mut stream) = to_host.lock() {
        let _ = write_frame(&mut *stream, kind, data);
    }
}
