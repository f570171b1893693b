//! Running a command in the lab VM from outside: one TCP connection a command, over QEMU's port forward on 127.0.0.1.
//!
//! ```text
//! client → {"token":…,"argv":[…],"env":[…],"cwd":…}\n      one JSON line
//! client → frames Stdin (empty: end of input)
//! agent  → frames Stdout, Stderr, …, Exit(code)
//! ```
//! A frame is a kind byte, a 32-bit little-endian length and that many bytes. When the client goes away the agent kills
//! the command with everything in its process group, so an interrupted test leaves nothing behind. The token keeps other
//! users of the host out: the port is reachable by everybody on 127.0.0.1.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Port that the agent listens on inside the VM.
pub const AGENT_PORT: u16 = 7000;
/// Longest frame either side accepts, in bytes.
pub const MAX_FRAME: u32 = 1 << 20;

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Proof that the client may: the VM's own token.
    pub token: String,
    /// Command and arguments. Empty: only say that the agent is there.
    pub argv: Vec<String>,
    /// Environment on top of the agent's.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: Option<String>,
}

/// Kinds of frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes for the command's standard input; an empty frame ends it.
    Stdin,
    /// Bytes from its standard output.
    Stdout,
    /// Bytes from its standard error.
    Stderr,
    /// Its exit code as 32-bit little endian; 128 + N after signal N. The last frame.
    Exit,
}

impl Kind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Exit => 3,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr, Self::Exit].into_iter().find(|k| k.to_byte() == byte)
    }
}

/// Write one frame.
pub fn write_frame(to: &mut impl Write, kind: Kind, data: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(5 + data.len());
    frame.push(kind.to_byte());
    let len = u32::try_from(data.len()).map_err(|_| io::Error::other("a frame longer than 4 GiB"))?;
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(data);
    to.write_all(&frame)
}

/// Read one frame; `None` at the end of the stream.
pub fn read_frame(from: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0u8; 5];
    match from.read_exact(&mut head) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let kind = Kind::from_byte(head[0]).ok_or_else(|| bad(format!("unknown frame kind {}", head[0])))?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    if len > MAX_FRAME {
        return Err(bad(format!("a frame of {len} bytes; at most {MAX_FRAME} are allowed")));
    }
    let mut data = vec![0; len as usize];
    from.read_exact(&mut data)?;
    Ok(Some((kind, data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_written() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Kind::Stdout, b"hello").unwrap();
        write_frame(&mut wire, Kind::Exit, &7i32.to_le_bytes()).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read_frame(&mut from).unwrap(), Some((Kind::Stdout, b"hello".to_vec())));
        assert_eq!(read_frame(&mut from).unwrap(), Some((Kind::Exit, vec![7, 0, 0, 0])));
        assert_eq!(read_frame(&mut from).unwrap(), None);
    }

    #[test]
    fn a_frame_that_claims_to_be_huge_is_refused() {
        let mut from: &[u8] = &[1, 0xff, 0xff, 0xff, 0xff];
        assert!(read_frame(&mut from).is_err());
    }
}
