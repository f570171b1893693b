//! The gate, as a guest, cuts, commits and a tap use it.

use proptest::prelude::*;

use super::*;

const SMALL: Bound = Bound { bytes: 400, packets: 8, at: AtBound::Wait };

fn packet(n: u64, len: usize) -> Packet {
    let mut frame = n.to_le_bytes().to_vec();
    frame.resize(len.max(8), 0);
    Packet { frame, ..Packet::default() }
}
fn number(packet: &Packet) -> u64 {
    u64::from_le_bytes(packet.frame[..8].try_into().unwrap())
}
fn numbers(packets: &[Packet]) -> Vec<u64> {
    packets.iter().map(number).collect()
}

#[test]
fn nothing_leaves_before_its_commit_and_then_in_its_order() {
    let mut g = PacketGate::new(SMALL);
    g.push(packet(0, 8));
    g.push(packet(1, 8));
    assert!(g.uncovered());
    g.seal(Epoch(1));
    assert!(!g.uncovered());
    g.push(packet(2, 8));
    assert!(g.uncovered() && g.take(9999).is_empty());
    g.commit(Epoch(1));
    assert_eq!((g.released_waiting(), g.held_packets(), g.held_bytes()), (2, 1, 20));
    assert_eq!(numbers(&g.take(9999)), [0, 1]);
    g.seal(Epoch(2));
    g.commit(Epoch(2));
    assert_eq!(numbers(&g.take(9999)), [2]);
}

#[test]
fn a_session_that_is_gone_commits_nothing() {
    let mut g = PacketGate::new(SMALL);
    g.push(packet(0, 8));
    g.seal(Epoch(1));
    g.unseal();
    g.commit(Epoch(1));
    assert!(g.take(9999).is_empty());
    assert!(g.uncovered(), "the next session has to cut for it");
}

#[test]
fn an_open_gate_is_passed_by_unless_something_waits_before() {
    let mut g = PacketGate::new(SMALL);
    assert!(!g.passes());
    g.push(packet(0, 8));
    g.open();
    assert!(!g.passes(), "number 0 is before");
    g.push(packet(1, 8));
    assert_eq!(numbers(&g.take(1)), [0], "one at least, whatever the size of a burst");
    assert_eq!(numbers(&g.take(1)), [1]);
    assert!(!g.passes(), "number 1 may come back");
    g.written();
    assert!(g.passes());
}

#[test]
fn what_the_tap_does_not_take_is_the_next_again() {
    let mut g = PacketGate::new(SMALL);
    g.open();
    (0..4).for_each(|n| assert!(g.push(packet(n, 8))));
    let mut burst = g.take(60);
    assert_eq!(numbers(&burst), [0, 1, 2]);
    g.put_back(burst.split_off(1));
    assert_eq!(g.stats().sent, 1);
    assert_eq!(numbers(&g.take(9999)), [1, 2, 3]);
}

#[test]
fn at_the_bound_the_guest_waits_and_that_is_counted_once_each_time() {
    let mut g = PacketGate::new(Bound { packets: 2, ..SMALL });
    (0..2).for_each(|n| assert!(g.push(packet(n, 8))));
    assert!(!g.ask_room() && !g.ask_room());
    assert_eq!((g.stats().waits, g.stats().dropped), (1, 0));
    g.open();
    assert!(!g.room(), "released, and not yet written");
    g.take(9999);
    assert!(!g.room(), "taken, and not yet written: it may come back");
    g.written();
    assert!(g.ask_room());
}

#[test]
fn or_the_newest_packet_is_dropped() {
    let mut g = PacketGate::new(Bound { at: AtBound::Drop, ..SMALL });
    let taken = (0..20).filter(|n| g.push(packet(*n, 80))).count();
    assert!(g.room());
    assert_eq!((taken, g.stats().dropped), (5, 15));
    g.open();
    assert_eq!(numbers(&g.take(9999)), [0, 1, 2, 3, 4]);
}

#[test]
fn after_the_machine_has_gone_not_even_a_packet_leaves_that_was_handed_out_before() {
    let mut g = PacketGate::new(SMALL);
    g.open();
    g.push(packet(0, 8));
    g.push(packet(1, 8));
    let burst = g.take(1);
    assert_eq!(g.discard(), 1);
    g.put_back(burst);
    g.open();
    assert!(g.take(9999).is_empty());
    assert_eq!(g.stats().discarded, 1);
}

#[test]
fn how_long_packets_were_held_is_known() {
    let mut g = PacketGate::new(SMALL);
    g.set_time(Duration::from_millis(1));
    g.push(packet(0, 8));
    g.seal(Epoch(1));
    g.set_time(Duration::from_millis(4));
    g.push(packet(1, 8));
    g.commit(Epoch(1));
    let held = g.stats().held.histogram();
    assert_eq!((held.count, held.max, held.quantile(0.99)), (1, 3000, 3000));
}

#[derive(Debug, Clone)]
enum Step {
    Push(usize),
    Seal,
    Commit(usize),
    Write { bytes: usize, refused: usize },
    Gate(bool),
    SessionEnds,
    Failover,
    Fenced,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1usize..120).prop_map(Step::Push),
        3 => Just(Step::Seal),
        3 => (0usize..4).prop_map(Step::Commit),
        4 => ((1usize..300), (0usize..3)).prop_map(|(bytes, refused)| Step::Write { bytes, refused }),
        1 => any::<bool>().prop_map(Step::Gate),
        1 => Just(Step::SessionEnds),
        1 => Just(Step::Failover),
        1 => Just(Step::Fenced),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    /// Whatever the order of packets, cuts, commits, bursts that the tap takes in part, gates that open and close, sessions that end,
    /// takeovers and fencing: packets leave once, in order, and none that the newest committed image has not sent (unless the
    /// gate was open). Of what was not lost with a machine or at the bound none is missing. The guest's own count goes back
    /// with its image; so a number may be seen again only if it was never seen.
    #[test]
    fn packets_leave_once_in_order_and_none_uncommitted(steps in steps(), drops in any::<bool>()) {
        let bound = Bound { at: if drops { AtBound::Drop } else { AtBound::Wait }, ..SMALL };
        let mut g = PacketGate::new(bound);
        let mut epoch = 0u64;
        let mut next = 0u64;                           // the guest's state: number of its next packet
        let mut images: Vec<(Epoch, u64)> = vec![];    // cuts not yet committed: state in each
        let mut allowed = 0u64;                        // state of the newest committed image, or of the present if open
        let mut open = false;
        let mut expected: VecDeque<u64> = VecDeque::new();  // what the gate has taken and not written, in order
        let mut seen: Option<u64> = None;
        for step in steps {
            match step {
                Step::Push(len) => if g.ask_room() {
                    let taken = g.push(packet(next, len));
                    prop_assert!(taken || drops);
                    if taken { expected.push_back(next); }
                    next += 1;
                },
                Step::Seal => { epoch += 1; g.seal(Epoch(epoch)); images.push((Epoch(epoch), next)); }
                Step::Commit(n) => if n > 0 && n <= images.len() {
                    let (committed, state) = images[n - 1];
                    images.drain(..n);
                    g.commit(committed);
                    allowed = allowed.max(state);
                },
                Step::Write { bytes, refused } => {
                    let mut burst = g.take(bytes);
                    prop_assert!(burst.len() <= 1 || burst.iter().map(Packet::bytes).sum::<usize>() <= bytes);
                    let back = burst.split_off(burst.len().saturating_sub(refused));
                    for p in &burst {
                        let n = number(p);
                        prop_assert_eq!(Some(n), expected.pop_front());
                        prop_assert!(n < allowed, "packet {} left, {} allowed", n, allowed);
                        prop_assert!(seen.is_none_or(|seen| n > seen), "packet {} after {:?}", n, seen);
                        seen = Some(n);
                    }
                    g.put_back(back);
                }
                Step::Gate(to) => {
                    open = to;
                    if to { g.open(); images.clear() } else { g.hold() }
                }
                Step::SessionEnds => { g.unseal(); images.clear(); }
                Step::Failover => if !open {
                    // Another VMM begins from the image. (With an open gate there is none that may: it is outdated.)
                    g = PacketGate::new(bound);
                    next = allowed;
                    images.clear();
                    expected.clear();
                },
                Step::Fenced => { g.discard(); open = false; images.clear(); expected.clear(); }
            }
            if open { allowed = next; }
            let kept: usize = expected.len();
            prop_assert_eq!(kept, g.held_packets() + g.released_waiting());
            prop_assert!(kept <= bound.packets && g.stats().most_bytes < bound.bytes + 120 + 12);
            prop_assert_eq!(g.held_bytes() == 0, g.held_packets() == 0);
        }
    }
}
