//! Questions by UDP, a few every second, whatever comes back.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Home, Kind, enter_client};
use crate::connections::judge::Echoes;
use crate::connections::switch::guest;

const ECHO: u16 = 7;

/// Until the end.
pub fn run(home: &Home) -> Result<()> {
    enter_client()?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("opening a socket")?;
    socket.connect((guest(), ECHO)).context("connecting a socket")?;
    let (mut echoes, mut next, mut buffer) = (Echoes::default(), Instant::now(), [0; 2048]);
    while !home.stopping() {
        let now = Instant::now();
        if now >= next {
            next = now + home.pause();
            let number = echoes.ask(now);
            // What the network does not take was lost on it.
            let _ = socket.send(&[number.to_le_bytes(), [0; 8]].concat());
            home.state().totals.udp_asked = echoes.asked;
        }
        let left = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left)).context("setting a timeout")?;
        match socket.recv(&mut buffer) {
            Ok(n) => {
                echoes.answer(&buffer[..n], Instant::now()).map_err(anyhow::Error::msg)?;
                home.beat_and(Kind::Udp, |state| {
                    state.totals.udp_answered = echoes.answered;
                    state.udp_times.append(&mut echoes.times);
                });
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // The guest is not found, or its server is not there yet.
            Err(e) if matches!(e.kind(), ErrorKind::HostUnreachable | ErrorKind::ConnectionRefused) => {}
            Err(e) => bail!("listening: {e}"),
        }
    }
    Ok(())
}
