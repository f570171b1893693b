//! The session of several paths under everything that a network does, with thousands of seeds: paths that fall silent in one direction or both,
//! are reset, come back, are slow; ends that stop reading, restart, close. What must hold: the bytes read are the bytes written, in order,
//! once, of this session and of no other; while one path works, everything arrives; a session is never lost while a path works.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use understudy_replicator::paths::core::{Core, End, Incarnation, Next, Outgoing, Settings};
use understudy_replicator::paths::door::{Door, Knock};
use understudy_replicator::paths::wire::{Frame, SessionId};

const STEP: Duration = Duration::from_millis(2);
const LIMIT: Duration = Duration::from_secs(120);

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn settings(random: &mut Random) -> Settings {
    Settings { window: 20_000 + random.below(200_000), ..Settings::default() }
}

/// Byte `offset` of the stream of direction `to` in `session`.
fn content(session: SessionId, to: usize, offset: u64) -> u8 {
    let mixed = (offset / 7).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(session.0[0]) << 8 ^ to as u64;
    (mixed ^ mixed >> 31 ^ offset) as u8
}

/// One TCP connection: in order, each way with its own delay; what is under way is lost when it breaks.
#[derive(Default)]
struct Wire {
    /// For each direction: when it arrives, and what.
    under_way: [VecDeque<(Duration, Vec<u8>)>; 2],
}

/// A network path: cut and slow for as long as it is, whatever connection runs over it.
#[derive(Default)]
struct Plane {
    /// Nothing arrives in this direction until then.
    silent_until: [Duration; 2],
    refuses_until: Duration,
    delay: Duration,
    wire: Option<(Wire, [Incarnation; 2])>,
    retry_at: Duration,
    /// A handshake under way: when its first frame arrives.
    knocking: Option<(Duration, Frame)>,
}

struct End1 {
    core: Core,
    written: u64,
    read: u64,
}

impl End1 {
    fn new(settings: Settings, paths: usize) -> Self {
        Self { core: Core::new(settings, paths), written: 0, read: 0 }
    }
}

struct World {
    random: Random,
    now: Duration,
    settings: Settings,
    session: SessionId,
    planes: Vec<Plane>,
    near: End1,
    far: Option<Arc<std::sync::Mutex<End1>>>,
    door: Door<std::sync::Mutex<End1>>,
    total: [u64; 2],
    refusals: u64,
    switched: u64,
    lost: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let settings = settings(&mut random);
        let paths = 2 + random.below(2) as usize;
        let planes = (0..paths).map(|_| Plane { delay: Duration::from_micros(100), ..Plane::default() }).collect();
        let total = [600_000 + random.below(1_400_000), 50_000 + random.below(300_000)];
        let session = SessionId([random.next() as u8; 16]);
        let near = End1::new(settings, paths);
        Self {
            random,
            now: Duration::ZERO,
            settings,
            session,
            planes,
            near,
            far: None,
            door: Door::default(),
            total,
            refusals: 0,
            switched: 0,
            lost: false,
        }
    }

    /// `to`: 1 = the far end, 0 = the near one.
    fn with_end<T>(&mut self, end: usize, what: impl FnOnce(&mut End1) -> T) -> Option<T> {
        match end {
            0 => Some(what(&mut self.near)),
            _ => self.far.as_ref().map(|far| what(&mut far.lock().unwrap())),
        }
    }

    /// A silent plane for a while, a reset, a slow one; at least one plane is left alone.
    fn trouble(&mut self, safe: usize) {
        if self.now < Duration::from_millis(100) {
            return;
        }
        for plane in 0..self.planes.len() {
            if plane == safe || !self.random.one_in(200) {
                continue;
            }
            let long = Duration::from_millis(self.random.below(1500));
            let (kind, now) = (self.random.below(6), self.now);
            if kind == 3 || kind == 5 {
                self.reset(plane);
            }
            let slot = &mut self.planes[plane];
            match kind {
                0 => slot.silent_until = [now + long; 2],
                1 => slot.silent_until[0] = now + long,
                2 => slot.silent_until[1] = now + long,
                3 => slot.refuses_until = now + long,
                4 => slot.delay = Duration::from_millis(self.random.below(120)),
                _ => {}
            }
        }
    }

    fn reset(&mut self, plane: usize) {
        if let Some((_, incarnations)) = self.planes[plane].wire.take() {
            let now = self.now;
            for (end, incarnation) in incarnations.into_iter().enumerate() {
                self.with_end(end, |e| e.core.detach(plane, incarnation, "reset", now));
            }
        }
    }

    /// The connecting side's supervisor of a path, and the accepting side's door.
    fn mend(&mut self, plane: usize) {
        let now = self.now;
        // A connection that the core has given up is closed.
        if let Some((_, incarnations)) = &self.planes[plane].wire {
            let incarnations = *incarnations;
            let known =
                (0..2).all(|end| self.with_end(end, |e| e.core.incarnation(plane)) == Some(Some(incarnations[end])));
            if !known {
                self.reset(plane);
            }
        }
        let slot = &self.planes[plane];
        let blocked = slot.silent_until.iter().any(|until| *until > now) || slot.refuses_until > now;
        if slot.wire.is_none() && slot.knocking.is_none() && now >= slot.retry_at && !blocked {
            // (Any path may open it; here the first that comes.)
            let opened = self.far.is_some() || self.near.core.report(now).iter().any(|p| p.works || p.losses > 0);
            let ours = |frame: &Frame| matches!(frame, Frame::Open { session, .. } if *session == self.session);
            let others = self.planes.iter().any(|p| p.knocking.as_ref().is_some_and(|(_, frame)| ours(frame)));
            let frame = match opened {
                true => Frame::Join { session: self.session, path: plane },
                false if others => return,
                false => Frame::Open { session: self.session, path: plane, paths: self.planes.len() },
            };
            // A handshake may stand in the peer's queue for long.
            let late = if self.random.one_in(4) { self.random.below(800) } else { self.random.below(20) };
            self.planes[plane].knocking = Some((now + Duration::from_millis(late), frame));
        }
        if self.planes[plane].knocking.as_ref().is_some_and(|(at, _)| *at <= now) {
            let Some((_, frame)) = self.planes[plane].knocking.take() else { return };
            self.planes[plane].retry_at = now + Duration::from_millis(200);
            let far = match self.door.knock(&frame) {
                Knock::Open { session, .. } => {
                    let end = Arc::new(std::sync::Mutex::new(End1::new(self.settings, self.planes.len())));
                    self.door.admit(session, &end);
                    self.far = Some(end.clone());
                    end
                }
                Knock::Join(end, _) => end,
                Knock::Refused(_) => {
                    self.refusals += 1;
                    if matches!(frame, Frame::Join { session, .. } if session == self.session) {
                        self.near.core.refused("unknown");
                    }
                    return;
                }
            };
            let there = far.lock().unwrap().core.attach(plane, now);
            let here = match frame {
                Frame::Open { session, .. } | Frame::Join { session, .. } if session == self.session => {
                    self.near.core.attach(plane, now)
                }
                _ => None,
            };
            match (here, there) {
                (Some(here), Some(there)) => self.planes[plane].wire = Some((Wire::default(), [here, there])),
                (Some(here), None) => self.near.core.detach(plane, here, "nobody is there", now),
                (None, Some(there)) if matches!(&frame, Frame::Join { session, .. } if *session != self.session) => {
                    // A sender of before, which goes on sending as if its peer were the old one.
                    let Frame::Join { session: old, .. } = frame else { return };
                    let mut far = far.lock().unwrap();
                    let from = far.read.saturating_sub(500);
                    for at in (from..from + 20_000).step_by(100) {
                        let bytes = (at..at + 100).map(|at| content(old, 1, at)).collect();
                        let _ = far.core.heard(plane, there, Frame::Data(at, bytes), now);
                    }
                    far.core.detach(plane, there, "it ended at last", now);
                }
                (None, Some(there)) => far.lock().unwrap().core.detach(plane, there, "nobody is there", now),
                _ => {}
            }
        }
    }

    fn carry(&mut self, plane: usize) {
        let now = self.now;
        for to in 0..2 {
            let from = 1 - to;
            let Some((_, incarnations)) = &self.planes[plane].wire else { return };
            let incarnations = *incarnations;
            for _ in 0..20 {
                // What the kernel takes at once is bounded.
                let queued: usize = self.planes[plane]
                    .wire
                    .as_ref()
                    .map_or(0, |(w, _)| w.under_way[to].iter().map(|(_, bytes)| bytes.len()).sum());
                if queued > 60_000 {
                    break;
                }
                let next = self.with_end(from, |e| e.core.next(plane, incarnations[from], now));
                let bytes = match next {
                    Some(Next::Send(Outgoing::Data(bytes))) => bytes.to_vec(),
                    Some(Next::Send(Outgoing::Control(frame))) => frame.encode(),
                    _ => break,
                };
                let jitter = Duration::from_micros(self.random.below(3000));
                let slot = &mut self.planes[plane];
                let at = now + slot.delay + jitter;
                let Some((wire, _)) = &mut slot.wire else { return };
                // TCP keeps the order of a connection; paths overtake each other.
                let at = wire.under_way[to].back().map_or(at, |(last, _)| at.max(*last));
                wire.under_way[to].push_back((at, bytes));
            }
            if self.planes[plane].silent_until[to] > now {
                continue;
            }
            while let Some((wire, _)) = &mut self.planes[plane].wire
                && wire.under_way[to].front().is_some_and(|(at, _)| *at <= now)
            {
                let Some((_, bytes)) = wire.under_way[to].pop_front() else { break };
                let (frame, len) = Frame::parse(&bytes).unwrap().unwrap();
                assert_eq!(len, bytes.len());
                let heard = self.with_end(to, |e| e.core.heard(plane, incarnations[to], frame, now));
                assert_eq!(heard, Some(Ok(())), "an honest peer breaks no rule");
            }
        }
    }

    fn stream(&mut self) {
        for end in 0..2 {
            let (session, total) = (self.session, self.total);
            let (writes, reads) = (!self.random.one_in(3), !self.random.one_in(4));
            let (most, some) = (1 + self.random.below(3_000), 1 + self.random.below(40_000) as usize);
            self.with_end(end, |e| {
                let (to, from) = (1 - end, end);
                let n = most.min(total[to] - e.written);
                if writes && n > 0 {
                    let bytes: Vec<u8> = (e.written..e.written + n).map(|at| content(session, to, at)).collect();
                    e.written += e.core.write(&bytes) as u64;
                }
                if reads {
                    let mut buf = vec![0; some];
                    let n = e.core.read(&mut buf);
                    for (at, byte) in (e.read..).zip(&buf[..n]) {
                        assert_eq!(*byte, content(session, from, at), "byte {at} towards {from}");
                    }
                    e.read += n as u64;
                }
            });
        }
    }

    fn arrived(&mut self) -> bool {
        let total = self.total;
        let near = self.near.read == total[0];
        near && self.with_end(1, |e| e.read == total[1]) == Some(true)
    }

    fn step(&mut self, safe: usize) {
        self.now += STEP;
        self.trouble(safe);
        for plane in 0..self.planes.len() {
            self.mend(plane);
            self.carry(plane);
        }
        self.stream();
        let now = self.now;
        for end in 0..2 {
            self.with_end(end, |e| e.core.tick(now));
        }
        let news = self.near.core.take_news();
        self.switched +=
            news.iter().filter(|n| matches!(n, understudy_replicator::paths::core::News::Switched { .. })).count()
                as u64;
        self.lost |=
            self.near.core.is_over().is_some() || self.with_end(1, |e| e.core.is_over().is_some()) == Some(true);
    }
}

/// Seeds of each test; `PATHS_SEEDS` for more, `PATHS_FIRST` to begin with another.
fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("PATHS_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let first = std::env::var("PATHS_FIRST").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    first..1 + count
}

#[test]
fn everything_arrives_once_and_in_order_while_one_path_works_whatever_the_others_do() {
    let (mut switched, mut slowest) = (0, Duration::ZERO);
    for seed in seeds() {
        let mut world = World::new(seed);
        let mut safe = 0;
        let mut change = Duration::from_millis(300);
        while !world.arrived() {
            world.step(safe);
            if world.lost {
                let now = world.now;
                let (near, far) = (world.near.core.report(now), world.with_end(1, |far| far.core.report(now)));
                panic!("seed {seed}: lost at {now:?} although path {safe} works: {near:#?}, {far:#?}");
            }
            assert!(world.now < LIMIT, "seed {seed}: it does not get through: {:?}", world.near.core.report(world.now));
            // Another path is the one that stays, once that one works.
            let (now, next) = (world.now, (safe + 1) % world.planes.len());
            let works = |end: &mut End1| end.core.report(now)[next].works;
            if now > change && (0..2).all(|end| world.with_end(end, works) == Some(true)) {
                safe = next;
                world.planes[safe].silent_until = [Duration::ZERO; 2];
                world.planes[safe].refuses_until = Duration::ZERO;
                change = world.now + Duration::from_millis(200 + world.random.below(800));
            }
        }
        switched += world.switched;
        slowest = slowest.max(world.now);
    }
    println!("{switched} changes of path, the slowest seed took {slowest:?}");
    assert!(switched > seeds().end, "the paths were hardly ever cut: {switched}");
}

#[test]
fn a_restarted_end_never_hears_what_was_sent_to_the_one_before() {
    let (mut refusals, mut restarts) = (0, 0);
    for seed in seeds() {
        let mut world = World::new(seed ^ 0xABCD_0000);
        for round in 0..3 {
            let until = world.now + Duration::from_millis(300 + world.random.below(900));
            while world.now < until && !world.arrived() {
                world.step(0);
                if world.near.core.is_over().is_some() {
                    break;
                }
            }
            restarts += 1;
            let opened = world.far.is_some() && world.near.core.report(world.now).iter().any(|path| path.works);
            if opened && world.random.one_in(2) {
                // The receiver restarts: its process knows no session; connections are reset, but handshakes may still be under way.
                world.far = None;
                world.door = Door::default();
                for plane in 0..world.planes.len() {
                    if let Some((_, incarnations)) = world.planes[plane].wire.take() {
                        let now = world.now;
                        world.near.core.detach(plane, incarnations[0], "reset", now);
                    }
                }
                let patience = world.now + Duration::from_secs(8);
                while world.near.core.is_over().is_none() {
                    assert!(world.now < patience, "seed {seed}: the sender does not notice that its peer is another");
                    world.step(0);
                }
            }
            // The sender restarts, or begins anew; handshakes of its old session may arrive late.
            for plane in 0..world.planes.len() {
                world.planes[plane].wire = None;
                world.planes[plane].retry_at = world.now;
            }
            if let Some(far) = world.far.take() {
                far.lock().unwrap().core.close();
            }
            world.session = SessionId([world.session.0[0].wrapping_add(1 + round); 16]);
            world.near = End1::new(world.settings, world.planes.len());
            world.lost = false;
        }
        refusals += world.refusals;
        while !world.arrived() {
            world.step(0);
            if world.near.core.is_over().is_some() {
                break;
            }
            assert!(world.now < LIMIT, "seed {seed}: it does not get through");
        }
    }
    println!("{restarts} restarts, {refusals} late handshakes refused");
    assert!(refusals > seeds().end / 10, "handshakes were hardly ever late: {refusals}");
}

/// Two ends, both paths there, nothing sent yet.
fn joined() -> (Core, Core, [[Incarnation; 2]; 2]) {
    let (mut a, mut b) = (Core::new(Settings::default(), 2), Core::new(Settings::default(), 2));
    let incarnations = [0, 1].map(|p| [a.attach(p, Duration::ZERO).unwrap(), b.attach(p, Duration::ZERO).unwrap()]);
    (a, b, incarnations)
}

fn deliver(from: &mut Core, to: &mut Core, path: usize, [there, here]: [Incarnation; 2], now: Duration) -> usize {
    let mut data = 0;
    loop {
        let frame = match from.next(path, there, now) {
            Next::Send(Outgoing::Data(bytes)) => {
                data += 1;
                Frame::parse(&bytes).unwrap().unwrap().0
            }
            Next::Send(Outgoing::Control(frame)) => frame,
            Next::Wait | Next::End => return data,
        };
        to.heard(path, here, frame, now).unwrap();
    }
}

#[test]
fn a_silent_path_is_left_within_a_tenth_of_a_second_and_the_data_takes_the_other() {
    let (mut a, mut b, at) = joined();
    let ms = Duration::from_millis;
    let back = at.map(|[x, y]| [y, x]);
    for path in 0..2 {
        deliver(&mut a, &mut b, path, at[path], ms(0));
        deliver(&mut b, &mut a, path, back[path], ms(0));
        deliver(&mut a, &mut b, path, at[path], ms(0));
    }
    // Path 0 is cut; what is sent on it vanishes.
    assert_eq!(a.write(b"epoch"), 5);
    while !matches!(a.next(0, at[0][0], ms(1)), Next::Wait) {}
    let mut arrived = None;
    for now in (2..300).map(ms) {
        a.tick(now);
        b.tick(now);
        if deliver(&mut a, &mut b, 1, at[1], now) > 0 {
            arrived = Some(now);
            break;
        }
        deliver(&mut b, &mut a, 1, back[1], now);
    }
    assert!(arrived.is_some_and(|at| at < ms(100)), "it arrived at {arrived:?}");
    let mut buf = [0; 8];
    assert_eq!(b.read(&mut buf), 5);
    assert_eq!(&buf[..5], b"epoch");
    assert!(!a.report(ms(300))[0].works && a.report(ms(300))[1].active);
}

#[test]
fn a_peer_that_stands_still_altogether_costs_no_path() {
    let (mut a, _, at) = joined();
    let ms = Duration::from_millis;
    a.write(b"epoch");
    for (path, [near, _]) in at.into_iter().enumerate() {
        while !matches!(a.next(path, near, ms(1)), Next::Wait) {}
    }
    for now in (2..1900).step_by(10).map(ms) {
        a.tick(now);
        while !matches!(a.next(0, at[0][0], now), Next::Wait) {}
    }
    assert_eq!(a.is_over(), None);
    let report = a.report(ms(1900));
    assert!(report.iter().all(|path| path.losses == 0 && path.again_bytes == 0), "{report:?}");
}

#[test]
fn a_peer_that_breaks_the_rules_is_told_from_one_that_does_not() {
    use understudy_replicator::paths::wire::Level;
    let ms = Duration::from_millis;
    let window = Settings::default().window;
    for bad in [
        Frame::Data(window, vec![1]),
        Frame::Ack(Level { received: 1, limit: 1 }),
        Frame::Update(Level { received: 0, limit: u64::MAX }),
        Frame::Accept,
        Frame::Reject("no".into()),
        Frame::Open { session: SessionId([0; 16]), path: 0, paths: 2 },
    ] {
        let (mut a, _, at) = joined();
        assert!(a.heard(0, at[0][0], bad.clone(), ms(1)).is_err(), "{bad:?}");
    }
    let (mut a, _, at) = joined();
    assert!(a.heard(0, at[0][0], Frame::Data(0, vec![1, 2]), ms(1)).is_ok());
    assert!(a.heard(0, at[0][0], Frame::Close(1), ms(1)).is_err(), "it ends before what it sent");
}

#[test]
fn the_last_words_arrive_before_the_end() {
    let (mut a, mut b, at) = joined();
    let now = Duration::from_millis(5);
    a.write(b"refused: too old");
    a.close();
    // The other path is faster.
    deliver(&mut a, &mut b, 1, at[1], now);
    assert_eq!(b.ended(), None, "something is still to come");
    deliver(&mut a, &mut b, 0, at[0], now);
    let mut buf = [0; 64];
    assert_eq!(b.read(&mut buf), 16);
    assert_eq!(b.ended(), Some(End::Closed));
    assert!(matches!(a.next(0, at[0][0], now), Next::End));
}

#[test]
fn a_path_on_which_the_peer_is_heard_but_does_not_hear_is_left() {
    let (mut a, mut b, at) = joined();
    let ms = Duration::from_millis;
    let back = at.map(|[x, y]| [y, x]);
    a.write(b"epoch");
    let mut arrived = None;
    for now in (1..300).map(ms) {
        a.tick(now);
        b.tick(now);
        // Path 0 carries nothing to b; everything from b arrives, its questions too.
        while matches!(a.next(0, at[0][0], now), Next::Send(_)) {}
        deliver(&mut b, &mut a, 0, back[0], now);
        if deliver(&mut a, &mut b, 1, at[1], now) > 0 {
            arrived = Some(now);
            break;
        }
        deliver(&mut b, &mut a, 1, back[1], now);
    }
    assert!(arrived.is_some_and(|at| at < ms(100)), "it arrived at {arrived:?}");
}

#[test]
fn pieces_that_overlap_are_read_once() {
    let (mut a, _, at) = joined();
    let now = Duration::from_millis(1);
    for (offset, bytes) in [(4, &b"efgh"[..]), (0, b"abc"), (2, b"cdef"), (0, b"abcdefgh"), (6, b"ghij")] {
        a.heard(0, at[0][0], Frame::Data(offset, bytes.to_vec()), now).unwrap();
    }
    let mut buf = [0; 16];
    let n = a.read(&mut buf);
    assert_eq!(std::str::from_utf8(&buf[..n]), Ok("abcdefghij"));
}
