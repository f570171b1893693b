//! A guest with clients: the distribution's servers on the disk that is its root, and echoes of its own, at port 7.
//!
//! The UDP echo counts. Each answer carries the question's eight bytes, and how many answers there were, this one included: whoever asks sees whether the
//! guest forgot an answer that had left it.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::Guest;
use crate::storage::{Result, told};

const SCRIPT: &str = include_str!("services.sh");
/// The echo protocol's port (RFC 862).
const ECHO: u16 = 7;
/// What a question has at least, and what an answer adds to.
const QUESTION: usize = 8;

/// Serve for ever. The first thing that is wrong is the end of it.
pub fn serve(guest: &Guest) {
    guest.output.fresh_line();
    let wrong = match servers(guest) {
        Ok(never) => match never {},
        Err(why) => why,
    };
    loop {
        guest.error(&format!("services {wrong}"));
        thread::sleep(Duration::from_secs(5));
    }
}

fn servers(guest: &Guest) -> Result<Infallible> {
    crate::storage::enter(&guest.params.disk)?;
    let udp = told("opening the UDP echo", UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO)))?;
    let tcp = told("opening the TCP echo", TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO)))?;
    thread::spawn(move || echo_datagrams(&udp));
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            thread::spawn(move || echo_stream(stream));
        }
    });
    let mut script = Command::new("/bin/bash");
    script.args(["-c", SCRIPT, "services", &guest.params.net, &guest.params.ssh]);
    script.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut script = told("starting the servers", script.spawn())?;
    // What servers complain about goes where this program's lines go.
    for line in script.stderr.take().into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n')).flatten() {
        guest.output.emit('E', || format!("services said: {}", lab_guest::line::printable(&line)));
    }
    Err(match script.wait() {
        Ok(status) => format!("ended: {status}"),
        Err(why) => format!("ended: {why}"),
    })
}

fn echo_datagrams(socket: &UdpSocket) {
    let (mut buffer, mut count) = ([0; 2048], 0u64);
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        if len < QUESTION {
            continue;
        }
        count += 1;
        let mut answer = buffer[..len.max(2 * QUESTION)].to_vec();
        answer[QUESTION..2 * QUESTION].copy_from_slice(&count.to_le_bytes());
        let _ = socket.send_to(&answer, from);
    }
}

fn echo_stream(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    let _ = stream.set_nodelay(true);
    while let Ok(n) = stream.read(&mut buffer)
        && n > 0
        && stream.write_all(&buffer[..n]).is_ok()
    {}
}
