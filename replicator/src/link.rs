//! The connection between two replicators, and messages over it: thin functions that both sides share.
//!
//! A connection is one secure stream, or, where a node has several addresses, a session of several paths ([`crate::paths`]). Who connects
//! decides; who is connected to takes either. What is above knows a [`Reader`], a [`Writer`] and a [`Closer`].

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use understudy_protocol::control::PathStatus;
use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;
use understudy_protocol::secure::{
    REPLICATION, REPLICATION_IN_CLEAR, REPLICATION_PATHS, REPLICATION_PATHS_IN_CLEAR, SecureError, SecureReader,
    SecureStream, SecureWriter, Timeouts,
};
use understudy_protocol::urgent;

use crate::message::Message;
use crate::paths::core::{MAX_PATHS, Settings};
use crate::paths::door::{Door, Knock};
use crate::paths::session::{self, Session, halves, read_frame};
use crate::paths::wire::Frame;
use crate::paths::{self};

/// An attempt to connect a path that takes longer is begun anew.
const PATH_DIAL: Duration = Duration::from_secs(1);

/// The header of a message's frame.
pub fn header(generation: Generation, epoch: Epoch, message: &Message<'_>) -> Header {
    Header { kind: message.kind(), flags: 0, epoch, generation }
}

/// Append a message's frame to `out`.
pub fn encode(generation: Generation, epoch: Epoch, message: &Message<'_>, out: &mut Vec<u8>) -> io::Result<()> {
    Ok(frame::encode(&header(generation, epoch, message), &message.payload(), out)?)
}

/// Send one small message.
pub fn send(writer: &mut impl Write, generation: Generation, epoch: Epoch, message: &Message<'_>) -> io::Result<()> {
    let mut bytes = Vec::new();
    encode(generation, epoch, message, &mut bytes)?;
    writer.write_all(&bytes)
}

/// Whether what is replicated is encrypted. Both sides must have the same, and say so when they have not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Encryption {
    /// Nobody on the way can read or change it.
    #[default]
    On,
    /// For a link that nobody else can reach: both sides prove that they hold the key, then memory travels in clear.
    Off,
}

impl Encryption {
    /// Of one stream, and of a path.
    fn protocols(self) -> [&'static str; 2] {
        match self {
            Self::On => [REPLICATION, REPLICATION_PATHS],
            Self::Off => [REPLICATION_IN_CLEAR, REPLICATION_PATHS_IN_CLEAR],
        }
    }

    fn go_on(self, stream: SecureStream) -> SecureStream {
        match self {
            Self::On => stream,
            Self::Off => stream.in_clear(),
        }
    }
}

/// Timeouts of the stream for a given peer timeout.
pub fn timeouts(peer_timeout: Duration) -> Timeouts {
    Timeouts { handshake: peer_timeout.max(Duration::from_secs(1)), dead_peer: peer_timeout }
}

/// A node's addresses: `HOST:PORT`, or several of them with commas between.
pub fn addresses(list: &str) -> Vec<&str> {
    list.split(',').collect()
}

/// Whether a list of addresses can be one: a sentence if not.
pub fn check_addresses(list: &str) -> Result<(), String> {
    let all = addresses(list);
    for (i, address) in all.iter().enumerate() {
        let host = address.rsplit_once(':').map_or("", |(host, _)| host);
        if host.is_empty() || address.ends_with(':') {
            return Err(format!("{address:?} is not HOST:PORT"));
        }
        if all[..i].contains(address) {
            return Err(format!("{address} is named twice: two paths through one address are lost together"));
        }
    }
    if all.len() > MAX_PATHS {
        return Err(format!("a node has at most {MAX_PATHS} addresses"));
    }
    Ok(())
}

/// A connection.
#[derive(Debug)]
pub struct Link {
    /// What arrives.
    pub reader: Reader,
    /// What is sent.
    pub writer: Writer,
    /// Its end.
    pub closer: Closer,
    /// Where the peer is, for people.
    pub address: String,
}

/// The receiving half.
#[derive(Debug)]
pub enum Reader {
    /// Of one stream.
    One(SecureReader),
    /// Of several paths.
    Many(session::Reader),
}

/// The sending half.
#[derive(Debug)]
pub enum Writer {
    /// Of one stream.
    One(SecureWriter),
    /// Of several paths.
    Many(session::Writer),
}

/// Ends the connection from another thread, and knows how it is.
#[derive(Debug)]
pub enum Closer {
    /// Of one stream.
    One(TcpStream),
    /// Of several paths.
    Many(Arc<Session>),
}

impl Link {
    fn one(stream: SecureStream) -> io::Result<Self> {
        let closer = Closer::One(stream.socket()?);
        let address = stream.peer_addr().map_or_else(|_| "(gone)".into(), |a| a.to_string());
        let (reader, writer) = stream.split();
        Ok(Self { reader: Reader::One(reader), writer: Writer::One(writer), closer, address })
    }

    fn many(session: &Arc<Session>, address: String) -> Self {
        let (reader, writer) = halves(session);
        Self {
            reader: Reader::Many(reader),
            writer: Writer::Many(writer),
            closer: Closer::Many(session.clone()),
            address,
        }
    }
}

impl Reader {
    /// Let reads fail with [`io::ErrorKind::WouldBlock`] when nothing came for so long; `None` waits for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::One(reader) => reader.set_timeout(timeout),
            Self::Many(reader) => {
                reader.set_timeout(timeout);
                Ok(())
            }
        }
    }
}

impl Writer {
    /// Let writes fail when the peer has not taken the data for so long; `None` waits for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::One(writer) => writer.set_timeout(timeout),
            Self::Many(writer) => {
                writer.set_timeout(timeout);
                Ok(())
            }
        }
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::One(reader) => reader.read(buf),
            Self::Many(reader) => reader.read(buf),
        }
    }
}

impl Write for Writer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::One(writer) => writer.write(buf),
            Self::Many(writer) => writer.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Closer {
    /// End the connection, both ways at once.
    pub fn close(&self) {
        match self {
            Self::One(socket) => {
                let _ = socket.shutdown(Shutdown::Both);
            }
            Self::Many(session) => session.close(),
        }
    }

    /// End it so that the last words arrive.
    pub fn finish(&self) {
        match self {
            Self::One(socket) => {
                // Writing ends first.
                let _ = socket.shutdown(Shutdown::Write);
                let _ = socket.shutdown(Shutdown::Read);
            }
            Self::Many(session) => session.close(),
        }
    }

    /// A second one.
    pub fn twin(&self) -> io::Result<Self> {
        Ok(match self {
            Self::One(socket) => Self::One(socket.try_clone()?),
            Self::Many(session) => Self::Many(session.clone()),
        })
    }

    /// The paths, if it has several.
    pub fn paths(&self) -> Vec<PathStatus> {
        match self {
            Self::One(_) => Vec::new(),
            Self::Many(session) => session.status(),
        }
    }
}

/// Connect with the peer `name` at its addresses (see [`addresses`]).
pub fn connect(
    name: &str,
    list: &str,
    key: &Arc<Key>,
    encryption: Encryption,
    peer_timeout: Duration,
) -> Result<Link, String> {
    let [one, many] = encryption.protocols();
    let all = addresses(list);
    if let [address] = all[..] {
        let stream = dial(address, key, encryption, one, peer_timeout, peer_timeout)?;
        return Link::one(stream).map_err(|e| e.to_string());
    }
    let key = key.clone();
    let path =
        Box::new(move |address: &str| dial(address, &key, encryption, many, peer_timeout.min(PATH_DIAL), peer_timeout));
    let patience = timeouts(peer_timeout).handshake + peer_timeout;
    let settings = Settings::within(peer_timeout);
    let session =
        paths::connect::connect(name, all.into_iter().map(str::to_owned).collect(), settings, patience, path)?;
    Ok(Link::many(&session, list.to_owned()))
}

fn dial(
    address: &str,
    key: &Key,
    encryption: Encryption,
    protocol: &str,
    patience: Duration,
    peer_timeout: Duration,
) -> Result<SecureStream, String> {
    let resolved = address.to_socket_addrs().map_err(|e| e.to_string())?;
    let mut why = "the name has no address".to_owned();
    for address in resolved {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => {
                let secured = SecureStream::connect(stream, key, protocol, timeouts(peer_timeout));
                return secured.map(|stream| encryption.go_on(stream)).map_err(|e| e.to_string());
            }
            Err(e) => why = e.to_string(),
        }
    }
    Err(why)
}

/// Takes connections in.
pub struct Acceptor {
    key: Arc<Key>,
    encryption: Encryption,
    peer_timeout: Duration,
    door: Mutex<Door<Session>>,
}

impl Acceptor {
    /// For peers that hold this key.
    pub fn new(key: Arc<Key>, encryption: Encryption, peer_timeout: Duration) -> Self {
        Self { key, encryption, peer_timeout, door: Mutex::default() }
    }

    /// The accepting side's handshake. `None`: it was a path of a session that was there already, and has ended by now.
    pub fn accept(&self, stream: TcpStream) -> Result<Option<Link>, String> {
        let limits = timeouts(self.peer_timeout);
        let accepted: Result<_, SecureError> =
            SecureStream::accept_one_of(stream, &self.key, &self.encryption.protocols(), limits);
        let (stream, which) = accepted.map_err(|e| e.to_string())?;
        let stream = self.encryption.go_on(stream);
        match which {
            0 => Link::one(stream).map(Some).map_err(|e| e.to_string()),
            _ => self.accept_path(stream),
        }
    }

    fn accept_path(&self, mut stream: SecureStream) -> Result<Option<Link>, String> {
        let text = |e: io::Error| format!("a path was not made: {e}");
        let address = stream.peer_addr().map_or_else(|_| "(gone)".into(), |a: SocketAddr| a.to_string());
        let socket = stream.socket().map_err(text)?;
        socket.set_read_timeout(Some(timeouts(self.peer_timeout).handshake)).map_err(text)?;
        let first = read_frame(&mut stream).map_err(text)?;
        let first = first.ok_or_else(|| "a path was not made: the peer closed it".to_owned())?;
        let mut door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        let settings = Settings::within(self.peer_timeout);
        let knock = door.knock(&first);
        let mut opened = None;
        let (session, path) = match knock {
            Knock::Open { session: id, path, paths } => {
                let session = Session::start(id, &address, vec!["(not yet)".into(); paths], settings);
                // Before the peer is answered, or its next path comes too early.
                door.admit(id, &session);
                opened = Some(Link::many(&session, address));
                (session, path)
            }
            Knock::Join(session, path) => (session, path),
            Knock::Refused(why) => {
                drop(door);
                stream.write_all(&Frame::Reject(why.clone()).encode()).map_err(text)?;
                return Err(format!("the path from {address} was refused: {why}"));
            }
        };
        drop(door);
        stream.write_all(&Frame::Accept.encode()).map_err(text)?;
        if opened.is_some() {
            thread::spawn(move || {
                urgent::this_thread();
                session.run_path(path, stream);
            });
        } else {
            session.run_path(path, stream);
        }
        Ok(opened)
    }
}

/// Listen on this node's own addresses (see [`addresses`]). Of several, those that are not there yet are listened on all the same.
pub fn listen(list: &str) -> io::Result<Vec<TcpListener>> {
    let all = addresses(list);
    if let [one] = all[..] {
        let resolved: Vec<_> = one.to_socket_addrs()?.collect();
        return Ok(vec![TcpListener::bind(&resolved[..])?]);
    }
    all.into_iter().map(listen_early).collect()
}

/// Listen on an address whether or not the node has it now: a plane that is down when the node starts comes back later.
fn listen_early(address: &str) -> io::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let mut last = io::Error::other(format!("{address} has no address"));
    for resolved in address.to_socket_addrs()? {
        let bound = Socket::new(Domain::for_address(resolved), Type::STREAM, Some(Protocol::TCP)).and_then(|socket| {
            socket.set_reuse_address(true)?;
            match resolved {
                SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
                SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
            }
            socket.bind(&resolved.into())?;
            socket.listen(128)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => return Ok(socket.into()),
            Err(e) => last = e,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_address_or_several() {
        assert_eq!(addresses("10.0.0.1:1"), ["10.0.0.1:1"]);
        assert_eq!(addresses("10.0.0.1:1,[fe80::1]:1"), ["10.0.0.1:1", "[fe80::1]:1"]);
        for good in ["h:1", "h:1,i:1", "[::1]:1,h:2"] {
            assert_eq!(check_addresses(good), Ok(()));
        }
        for bad in ["", "h", ":1", "h:", "h:1,", ",h:1", "h:1,h:1", "a:1,b:1,c:1,d:1,e:1,f:1,g:1,h:1,i:1"] {
            assert!(check_addresses(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_that_is_not_there_yet_can_be_listened_on_beside_another() {
        // TEST-NET-1 of RFC 5737: nobody has it.
        let listeners = listen("127.0.0.1:0,192.0.2.1:7790").unwrap();
        assert_eq!(listeners.len(), 2);
        assert!(listen("192.0.2.1:7790").is_err(), "a node's only address must be there");
        // (2001:db8::/32 is for documents: RFC 3849. Not every host has IPv6.)
        if TcpListener::bind("[::1]:0").is_ok() {
            assert_eq!(listen("[::1]:0,[2001:db8::1]:7790").unwrap().len(), 2);
        }
    }
}
