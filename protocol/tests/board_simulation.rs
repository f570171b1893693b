//! Board sessions in a world that goes wrong at random: connections break with bytes in them, hosts die and come back as
//! zombies, standbys resume from older checkpoints, machines are cold-booted, the board service restarts.
//!
//! A guest here is a random generator: after a rollback it says something else than before. So one byte on the wire that
//! does not belong to the committed history, one missing, one twice, is seen at once. Every world is made from its seed:
//! `UNDERSTUDY_SEEDS=100000 cargo test -p understudy-protocol --release --test board_simulation` tries more of them,
//! `UNDERSTUDY_SEED=17` a single one.

use std::collections::{HashMap, VecDeque};

use understudy_protocol::board::{
    Attach, BoardPort, MAX_PAYLOAD, MachineEvent, MachinePort, Message, Output, PortConfig, SessionId,
};
use understudy_protocol::frame::Decoder;
use understudy_protocol::ids::Generation;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most) + 1).map(|_| self.next() as u8).collect()
    }
}

/// What a checkpoint holds.
#[derive(Clone)]
struct Guest {
    life: Generation,
    /// All that it ever sent.
    tx: Vec<u8>,
    /// Of this, known to be on the wire.
    tx_acked: u64,
    /// All that it ever took.
    rx: Vec<u8>,
}

struct Host {
    generation: Generation,
    guest: Guest,
    port: MachinePort,
    /// Input handed over by the port and not yet taken by the guest; the guest's next byte is its first.
    waiting: VecDeque<u8>,
    /// Cuts whose commit is not known here, oldest first.
    cuts: VecDeque<Guest>,
    /// Of these, how many the standby has committed.
    committed: usize,
    released: u64,
    fenced: bool,
    /// A zombie that believes itself alone: it sends without commit.
    solo: bool,
}

struct Connection {
    session: SessionId,
    host: usize,
    to_board: VecDeque<u8>,
    to_machine: VecDeque<u8>,
    board: Decoder,
    machine: Decoder,
    board_open: bool,
    machine_open: bool,
}

struct World {
    random: Random,
    board: BoardPort,
    durable: u64,
    hosts: Vec<Host>,
    connections: Vec<Connection>,
    next_session: SessionId,
    incarnation: u64,
    /// The standby's image.
    image: Option<Guest>,
    /// What each life has committed to have sent.
    history: HashMap<Generation, Vec<u8>>,
    /// What the wire has seen of each life.
    wire: HashMap<Generation, Vec<u8>>,
    /// What the device has said to each life.
    said: HashMap<Generation, Vec<u8>>,
    takeovers: usize,
    rollbacks: usize,
    fences: usize,
}

const WINDOW: u32 = 300;
const CAPACITY: usize = 200;

fn config(incarnation: u64) -> PortConfig {
    PortConfig { machine: "m".into(), device: "gps".into(), incarnation, window: WINDOW, input_capacity: CAPACITY }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: Random(seed),
            board: BoardPort::new(config(1), None),
            durable: 0,
            hosts: Vec::new(),
            connections: Vec::new(),
            next_session: 1,
            incarnation: 1,
            image: None,
            history: HashMap::new(),
            wire: HashMap::new(),
            said: HashMap::new(),
            takeovers: 0,
            rollbacks: 0,
            fences: 0,
        };
        world.take_over(true);
        world
    }

    fn newest(&self) -> usize {
        self.hosts.len() - 1
    }

    /// A new host runs the machine: from the image, or cold.
    fn take_over(&mut self, cold: bool) {
        let generation = Generation(self.hosts.len() as u64 + 1);
        if cold {
            self.image = None;
        }
        let guest = self.image.clone().unwrap_or(Guest { life: generation, tx: vec![], tx_acked: 0, rx: vec![] });
        self.takeovers += 1;
        if let Some(old) = self.hosts.last() {
            self.rollbacks += usize::from(old.guest.tx.len() > guest.tx.len() || old.guest.rx.len() > guest.rx.len());
        }
        let rx = guest.rx.len() as u64;
        let mut port = MachinePort::new("m", "gps", generation, guest.life, guest.tx_acked, rx);
        // What the checkpoint holds is committed, and is released at once.
        let acked = guest.tx_acked as usize;
        let held = if self.image.is_some() { guest.tx.len() } else { 0 };
        port.queue_output(guest.tx_acked, &guest.tx[acked.min(held)..held]).unwrap();
        self.hosts.push(Host {
            generation,
            released: held as u64,
            guest,
            port,
            waiting: VecDeque::new(),
            cuts: VecDeque::new(),
            committed: 0,
            fenced: false,
            solo: false,
        });
    }

    fn connect(&mut self, host: usize) {
        if self.hosts[host].fenced || self.connections.iter().any(|c| c.host == host && c.machine_open) {
            return;
        }
        let session = self.next_session;
        self.next_session += 1;
        self.hosts[host].port.connected();
        self.connections.push(Connection {
            session,
            host,
            to_board: VecDeque::new(),
            to_machine: VecDeque::new(),
            board: Decoder::new(MAX_PAYLOAD),
            machine: Decoder::new(MAX_PAYLOAD),
            board_open: true,
            machine_open: true,
        });
        self.board.opened(session);
        self.flush();
    }

    /// Put what both sides have to say on their connections.
    fn flush(&mut self) {
        while let Some(output) = self.board.poll() {
            let generation = self.board.ownership().generation;
            match output {
                Output::Send(id, message) => {
                    let Some(c) = self.connections.iter_mut().find(|c| c.session == id && c.board_open) else {
                        continue;
                    };
                    let whole = encoded(&message, generation);
                    match message {
                        // A board that says half of it twice.
                        Message::In { offset, bytes } if self.random.below(8) == 0 => {
                            let half = Message::In { offset, bytes: bytes[..bytes.len().div_ceil(2)].to_vec() };
                            c.to_machine.extend(encoded(&half, generation));
                        }
                        _ => {}
                    }
                    c.to_machine.extend(whole);
                }
                Output::Close(id) => {
                    if let Some(c) = self.connections.iter_mut().find(|c| c.session == id) {
                        c.board_open = false;
                    }
                }
            }
        }
        for (i, host) in self.hosts.iter_mut().enumerate() {
            while let Some(message) = host.port.poll_message() {
                let Some(c) = self.connections.iter_mut().find(|c| c.host == i && c.machine_open) else { continue };
                let whole = encoded(&message, host.generation);
                match message {
                    // A machine that says half of it twice.
                    Message::Out { offset, bytes } if self.random.below(8) == 0 => {
                        let half = Message::Out { offset, bytes: bytes[..bytes.len().div_ceil(2)].to_vec() };
                        c.to_board.extend(encoded(&half, host.generation));
                    }
                    _ => {}
                }
                c.to_board.extend(whole);
            }
            while let Some(event) = host.port.poll_event() {
                match event {
                    MachineEvent::Attached { .. } | MachineEvent::Notice { .. } => {}
                    MachineEvent::OutputApplied { upto } => {
                        host.guest.tx_acked = host.guest.tx_acked.max(upto);
                        if !host.solo {
                            assert!(upto <= host.guest.tx.len() as u64, "the wire is ahead of the machine");
                        }
                    }
                    MachineEvent::Input { offset, bytes } => {
                        assert_eq!(
                            offset,
                            (host.guest.rx.len() + host.waiting.len()) as u64,
                            "input in order and once"
                        );
                        host.waiting.extend(bytes);
                    }
                    MachineEvent::Fenced { newer } => {
                        assert!(newer > host.generation);
                        host.fenced = true;
                        self.fences += 1;
                    }
                    MachineEvent::Refused { why } => panic!("host {i} was refused: {why}"),
                }
            }
        }
    }

    /// Let some bytes of one connection arrive.
    fn deliver(&mut self, at: usize, to_board: bool, most: usize) {
        let c = &mut self.connections[at];
        if to_board {
            let n = most.min(c.to_board.len());
            let bytes: Vec<u8> = c.to_board.drain(..n).collect();
            c.board.push(&bytes);
            while self.connections[at].board_open {
                let Some(record) = self.connections[at].board.next_record().unwrap() else { break };
                let message = Message::from_record(&record).unwrap();
                let session = self.connections[at].session;
                let former = self.board.ownership();
                let durable = &mut self.durable;
                self.board.received(session, record.header.generation, message, &mut |ownership| {
                    *durable = ownership.generation.0;
                    Ok(())
                });
                let now = self.board.ownership();
                assert!(now.generation >= former.generation, "the owner's generation never falls");
                assert_eq!(now.generation.0, self.durable, "an owner is durable before it is the owner");
                if former.life == Generation::ZERO && now.life > Generation::ZERO {
                    let early = self.said.remove(&Generation::ZERO).unwrap_or_default();
                    self.said.insert(now.life, early);
                }
                self.flush();
            }
        } else {
            let n = most.min(c.to_machine.len());
            let bytes: Vec<u8> = c.to_machine.drain(..n).collect();
            if !c.machine_open {
                return;
            }
            c.machine.push(&bytes);
            while let Some(record) = self.connections[at].machine.next_record().unwrap() {
                let host = self.connections[at].host;
                let message = Message::from_record(&record).unwrap();
                self.hosts[host].port.received(message).unwrap();
                self.flush();
            }
            // The board closed: the machine notices once it has read everything.
            let c = &mut self.connections[at];
            if !c.board_open && c.to_machine.is_empty() {
                self.cut_machine(at);
            }
        }
    }

    fn cut_board(&mut self, at: usize) {
        let c = &mut self.connections[at];
        if c.board_open {
            c.board_open = false;
            self.board.closed(c.session);
        }
    }

    fn cut_machine(&mut self, at: usize) {
        let c = &mut self.connections[at];
        if c.machine_open {
            c.machine_open = false;
            c.to_machine.clear();
            let host = c.host;
            self.hosts[host].port.disconnected();
        }
    }

    fn restart_board(&mut self) {
        for at in 0..self.connections.len() {
            self.cut_board(at);
            self.connections[at].to_board.clear();
        }
        self.incarnation += 1;
        self.board = BoardPort::new(config(self.incarnation), Some(self.board.saved()));
    }

    /// The line takes some of what the board has for it.
    fn drive(&mut self, most: usize) {
        let output = self.board.output();
        let bytes = output[..output.len().min(most)].to_vec();
        let life = self.board.ownership().life;
        let wire = self.wire.entry(life).or_default();
        wire.extend(&bytes);
        let committed = self.history.get(&life).map_or(&[][..], |h| h);
        assert!(committed.starts_with(wire), "the wire shows what was not committed, not in order, or not once");
        self.board.written(bytes.len());
        self.flush();
    }

    fn device_speaks(&mut self) {
        let room = self.board.room();
        if room > 0 {
            let bytes = self.random.bytes(room.min(60));
            self.said.entry(self.board.ownership().life).or_default().extend(&bytes);
            self.board.device_read(&bytes);
            self.flush();
        }
    }

    fn run_guest(&mut self, at: usize) {
        let bytes = self.random.bytes(50);
        let take = self.random.below(40);
        let host = &mut self.hosts[at];
        // A guest's buffer is bounded as well.
        if host.guest.tx.len() as u64 - host.released.min(host.guest.tx.len() as u64) < 1000 {
            host.guest.tx.extend(&bytes);
        }
        let n = take.min(host.waiting.len());
        host.guest.rx.extend(host.waiting.drain(..n));
        if host.solo {
            let from = host.released.min(host.guest.tx.len() as u64) as usize;
            // A zombie may be so confused that it leaves out or repeats something: then its own port refuses.
            let _ = host.port.queue_output(from as u64, &host.guest.tx[from..]);
            host.released = host.guest.tx.len() as u64;
            host.port.acknowledge_input(host.guest.rx.len() as u64);
        }
    }

    fn cut(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.cuts.len() < 3 {
            host.cuts.push_back(host.guest.clone());
        }
    }

    /// The standby commits the oldest cut. Only the newest host has a standby.
    fn commit(&mut self) {
        let at = self.newest();
        let host = &mut self.hosts[at];
        if let Some(guest) = host.cuts.get(host.committed) {
            host.committed += 1;
            let history = self.history.entry(guest.life).or_default();
            assert!(guest.tx.starts_with(history), "a commit takes nothing back");
            history.clone_from(&guest.tx);
            let said = self.said.get(&guest.life).map_or(&[][..], |s| s);
            assert!(said.starts_with(&guest.rx), "the committed history took input that is wrong, missing or twice");
            self.image = Some(guest.clone());
        }
    }

    /// The host hears of a commit, and lets out what it covers.
    fn release(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.committed > 0 && !host.solo {
            host.committed -= 1;
            let guest = host.cuts.pop_front().unwrap();
            let from = host.released as usize;
            host.port.queue_output(host.released, &guest.tx[from..]).unwrap();
            host.released = guest.tx.len() as u64;
            host.port.acknowledge_input(guest.rx.len() as u64);
        }
    }

    fn step(&mut self) {
        let any = self.random.below(self.hosts.len());
        let host = if self.random.below(4) > 0 { self.newest() } else { any };
        match self.random.below(100) {
            0..14 => self.run_guest(host),
            14..22 => self.cut(host),
            22..30 => self.commit(),
            30..38 => self.release(host),
            38..46 => self.device_speaks(),
            46..56 => {
                let most = self.random.below(120);
                self.drive(most);
            }
            56..64 => self.connect(host),
            64..92 if !self.connections.is_empty() => {
                let at = self.random.below(self.connections.len());
                let to_board = self.random.below(2) == 0;
                let most = if self.random.below(3) == 0 { self.random.below(60) } else { 10_000 };
                self.deliver(at, to_board, most);
            }
            92..95 if !self.connections.is_empty() => {
                // Each side notices by itself; what is in the pipe may be lost or may still arrive.
                let at = self.random.below(self.connections.len());
                match self.random.below(4) {
                    0 => self.cut_board(at),
                    1 => self.cut_machine(at),
                    2 => {
                        self.cut_machine(at);
                        self.connections[at].to_board.clear();
                    }
                    _ => {
                        self.cut_board(at);
                        self.cut_machine(at);
                    }
                }
            }
            95 => self.restart_board(),
            96 | 97 if self.hosts.len() < 12 => {
                let cold = self.random.below(8) == 0;
                self.take_over(cold);
            }
            98 => {
                // A host that the board has seen superseded goes mad.
                let host = &mut self.hosts[any];
                if host.generation < self.board.ownership().generation {
                    host.solo = true;
                }
            }
            _ => {}
        }
        self.flush();
    }

    /// No more accidents: everything must come through.
    fn settle(&mut self) {
        for at in 0..self.connections.len() {
            self.cut_board(at);
            self.cut_machine(at);
        }
        let at = self.newest();
        for _ in 0..400 {
            self.connect(at);
            for c in 0..self.connections.len() {
                self.deliver(c, true, usize::MAX);
                self.deliver(c, false, usize::MAX);
            }
            self.drive(usize::MAX);
            let host = &mut self.hosts[at];
            let waiting: Vec<u8> = host.waiting.drain(..).collect();
            host.guest.rx.extend(waiting);
            self.cut(at);
            self.commit();
            self.release(at);
            self.flush();
        }
        let host = &self.hosts[at];
        let life = host.guest.life;
        assert!(self.wire.get(&life).map_or(&[][..], |w| w) == host.guest.tx, "all output came through");
        assert!(self.said.get(&life).map_or(&[][..], |s| s) == host.guest.rx, "all input came through");
        assert_eq!(host.guest.tx_acked, host.guest.tx.len() as u64, "and the machine knows");
    }
}

fn encoded(message: &Message, generation: Generation) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(generation, &mut bytes).unwrap();
    bytes
}

fn run(seed: u64) -> World {
    let mut world = World::new(seed);
    for _ in 0..2500 {
        world.step();
    }
    world.settle();
    world
}

#[test]
fn the_wire_sees_the_committed_history_once_and_in_order_and_so_does_the_machine() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seeds = match number("UNDERSTUDY_SEED") {
        Some(one) => one..one + 1,
        None => 0..number("UNDERSTUDY_SEEDS").unwrap_or(400),
    };
    let (mut takeovers, mut rollbacks, mut fences, mut wire) = (0, 0, 0, 0);
    for seed in seeds.clone() {
        let world =
            std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|_| panic!("the world of UNDERSTUDY_SEED={seed}"));
        takeovers += world.takeovers;
        rollbacks += world.rollbacks;
        fences += world.fences;
        wire += world.wire.values().map(Vec::len).sum::<usize>();
    }
    if seeds.end - seeds.start >= 100 {
        // The worlds are wild enough to prove something.
        let worlds = seeds.end as usize;
        assert!(takeovers > 5 * worlds && rollbacks > 3 * worlds && fences > worlds && wire > 500 * worlds);
    }
}

#[test]
fn a_zombie_is_told_and_nothing_of_it_is_written() {
    let mut board = BoardPort::new(config(1), None);
    let mut store = |_: &_| Ok(());
    let attach = |life| {
        let base = Attach { machine: "m".into(), device: "gps".into(), ..Attach::default() };
        Message::Attach(Attach { life: Generation(life), ..base })
    };
    board.received(1, Generation(1), attach(1), &mut store);
    board.received(1, Generation(1), Message::Out { offset: 0, bytes: b"accepted, not written".to_vec() }, &mut store);
    board.received(2, Generation(2), attach(1), &mut store);
    assert_eq!(board.output(), b"", "what the old owner left unwritten is not written any more");
    board.received(1, Generation(1), Message::Out { offset: 0, bytes: b"late".to_vec() }, &mut store);
    board.received(1, Generation(2), Message::Out { offset: 0, bytes: b"forged".to_vec() }, &mut store);
    board.received(3, Generation(1), attach(1), &mut store);
    assert_eq!(board.output(), b"");
    let said: Vec<Output> = std::iter::from_fn(|| board.poll()).collect();
    assert!(said.contains(&Output::Send(1, Message::Fenced { newer: Generation(2) })));
    assert!(said.contains(&Output::Send(3, Message::Stale { current: Generation(2) })));
    assert_eq!(board.owner(), Some(2));
}

#[test]
fn an_owner_that_cannot_be_made_durable_is_refused_and_the_old_one_stays() {
    let mut board = BoardPort::new(config(1), None);
    let base = Attach { machine: "m".into(), device: "gps".into(), life: Generation(1), ..Attach::default() };
    board.received(1, Generation(1), Message::Attach(base.clone()), &mut |_| Ok(()));
    while board.poll().is_some() {}
    board.received(2, Generation(2), Message::Attach(base), &mut |_| Err("the disk is full".into()));
    assert_eq!(board.owner(), Some(1));
    assert_eq!(board.ownership().generation, Generation(1));
    let said: Vec<Output> = std::iter::from_fn(|| board.poll()).collect();
    assert_eq!(said[0], Output::Send(2, Message::Refused { why: "the disk is full".into() }));
}

#[test]
fn a_board_that_forgot_everything_takes_over_the_machines_offsets() {
    let mut board = BoardPort::new(config(1), None);
    let attach = Attach {
        machine: "m".into(),
        device: "gps".into(),
        life: Generation(3),
        tx_acked: 5000,
        rx_acked: 700,
        rx_next: 800,
    };
    board.device_read(b"since the restart");
    board.received(1, Generation(7), Message::Attach(attach), &mut |_| Ok(()));
    let ownership = board.ownership();
    assert_eq!((ownership.applied, ownership.in_base, ownership.in_end), (5000, 800, 817));
    let said = format!("{:?}", std::iter::from_fn(|| board.poll()).collect::<Vec<_>>());
    assert!(said.contains("Reset { incarnation: 1, kept: false }"), "{said}");
}
