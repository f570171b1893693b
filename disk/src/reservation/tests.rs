//! A device with persistent reservations, simulated: several connections, requests that arrive late, power cuts of the device. The fence is run on it in all
//! orders that a few seeds give.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::*;

/// A request that was sent and has not arrived.
type Late = (usize, u64);

#[derive(Default)]
struct State {
    registered: BTreeMap<usize, Key>,
    holder: Option<usize>,
    /// Who wrote last.
    content: u64,
    late: Vec<Late>,
    aptpl: bool,
    /// Do as if the other's requests could not be ended.
    no_abort: bool,
}

/// One connection to the device.
#[derive(Clone)]
struct Nexus(usize, Arc<Mutex<State>>);

impl Nexus {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.1.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn conflict<T>() -> Result<T> {
        Err(Error::Preempted { disk: "sim".into() })
    }
    fn send(&self, value: u64) {
        self.state().late.push((self.0, value));
    }
    /// Requests of all connections arrive.
    fn arrive(&self) {
        let mut state = self.state();
        for (nexus, value) in std::mem::take(&mut state.late) {
            if state.holder.is_none() || state.registered.contains_key(&nexus) {
                state.content = value;
            }
        }
    }
    fn write(&self, value: u64) -> bool {
        let mut state = self.state();
        let may = state.holder.is_none() || state.registered.contains_key(&self.0);
        if may {
            state.content = value;
        }
        may
    }
    fn power_loss(&self) {
        let mut state = self.state();
        if !state.aptpl {
            (state.registered, state.holder) = Default::default();
        }
        state.late.clear();
    }
}

impl Reservations for Nexus {
    fn keys(&self) -> Result<Vec<Key>> {
        Ok(self.state().registered.values().copied().collect())
    }
    fn held(&self) -> Result<Option<Held>> {
        let state = self.state();
        Ok(state.holder.map(|holder| Held { key: state.registered[&holder], kind: TYPE }))
    }
    fn register(&self, key: Key) -> Result<bool> {
        self.state().registered.insert(self.0, key);
        Ok(self.state().aptpl)
    }
    fn reserve(&self, _: Key) -> Result<()> {
        let mut state = self.state();
        if !state.registered.contains_key(&self.0) || state.holder.is_some_and(|holder| holder != self.0) {
            return Self::conflict();
        }
        state.holder = Some(self.0);
        Ok(())
    }
    fn preempt_and_abort(&self, key: Key, other: Key) -> Result<()> {
        let mut state = self.state();
        if state.registered.get(&self.0) != Some(&key) {
            return Self::conflict();
        }
        let victims: Vec<_> = state.registered.iter().filter(|(_, k)| **k == other).map(|(n, _)| *n).collect();
        if victims.is_empty() {
            return Self::conflict();
        }
        for victim in victims {
            state.registered.remove(&victim);
            if !state.no_abort {
                state.late.retain(|(nexus, _)| *nexus != victim);
            }
            if state.holder == Some(victim) {
                state.holder = Some(self.0);
            }
        }
        Ok(())
    }
    fn unregister(&self, _: Key) -> Result<()> {
        let mut state = self.state();
        state.registered.remove(&self.0);
        if state.holder == Some(self.0) {
            state.holder = None;
        }
        Ok(())
    }
}

fn device(aptpl: bool) -> impl Fn(usize) -> Nexus {
    let state = Arc::new(Mutex::new(State { aptpl, ..State::default() }));
    move |nexus| Nexus(nexus, state.clone())
}

fn key(generation: u64) -> Key {
    Key::of("db1", &format!("n{}", generation % 2), Generation(generation))
}

fn take(nexus: &Nexus, generation: u64) -> Result<Fence> {
    Fence::take(Arc::new(nexus.clone()), "sim", key(generation))
}

#[test]
fn keys_tell_machine_node_and_generation() {
    let a = Key::of("db1", "n1", Generation(7));
    assert!(
        a.same_machine(Key::of("db1", "n2", Generation(8))) && !a.same_machine(Key::of("db2", "n1", Generation(7)))
    );
    assert_ne!(a, Key::of("db1", "n2", Generation(7)));
    assert!(Key::of("db1", "n1", Generation(8)).later_than(a) && !a.later_than(a));
    let last = Key::of("db1", "n1", Generation((1 << 24) - 1));
    assert!(
        Key::of("db1", "n1", Generation(1 << 24)).later_than(last)
            && !last.later_than(Key::of("db1", "n1", Generation(1 << 24)))
    );
    assert_ne!(Key::of("", "", Generation(0)).0, 0);
}

#[test]
fn after_a_takeover_nothing_of_the_predecessor_is_written_also_what_was_on_its_way() {
    for no_abort in [false, true] {
        let device = device(true);
        let (old, new) = (device(1), device(2));
        old.state().no_abort = no_abort;
        take(&old, 1).unwrap();
        assert!(old.write(1));
        assert!(!new.write(99), "who is not registered may not");
        old.send(98);
        take(&new, 2).unwrap();
        assert!(new.write(2) && !old.write(97));
        old.arrive();
        assert_eq!(new.state().content, 2);
    }
}

#[test]
fn others_reservations_and_later_generations_are_left_alone() {
    let device = device(true);
    let (a, b) = (device(1), device(2));
    Fence::take(Arc::new(a.clone()), "sim", Key::of("other", "n1", Generation(1))).unwrap();
    let refused = take(&b, 5).unwrap_err().to_string();
    assert!(refused.contains("not this machine's"), "{refused}");
    assert_eq!(a.keys().unwrap().len(), 1, "nothing stays registered");
    assert!(a.write(1) && !b.write(2));
    a.unregister(Key(0)).unwrap();
    take(&a, 5).unwrap();
    let refused = take(&b, 4).unwrap_err().to_string();
    assert!(refused.contains("not older"), "{refused}");
    assert!(a.write(1) && !b.write(2));
    let twin = Fence::take(Arc::new(b.clone()), "sim", Key::of("db1", "n9", Generation(5)));
    assert!(twin.is_err() && !b.write(2), "the same generation on another node");
}

#[test]
fn what_a_device_forgot_is_registered_again_but_never_for_who_was_superseded() {
    for aptpl in [false, true] {
        let device = device(aptpl);
        let (old, new) = (device(1), device(2));
        let fence = take(&old, 1).unwrap();
        assert_eq!(fence.persistent(), aptpl);
        old.power_loss();
        assert_eq!(new.write(50), !aptpl, "APTPL is what makes it survive");
        fence.again(|| Ok(())).unwrap();
        assert!(old.write(1) && !new.write(2));
        // The record changes at each of the two looks.
        for looks in [0, 1] {
            let superseded = std::cell::Cell::new(0);
            old.power_loss();
            let result = fence.again(|| {
                superseded.set(superseded.get() + 1);
                if superseded.get() > looks { Err(Error::Owned("superseded".into())) } else { Ok(()) }
            });
            assert!(result.is_err());
            if looks == 1 || !aptpl {
                assert!(old.keys().unwrap().is_empty(), "it withdraws");
            }
        }
    }
}

/// Owner and successor take every interleaving of their steps: the owner comes back after the device forgot it, the successor takes over meanwhile. In the end
/// only the successor may write.
#[test]
fn whoever_comes_back_while_it_is_superseded_is_seen_by_one_of_the_two() {
    // The fence's own steps, as `again` and `take` make them, each one atomic at the device or in the record.
    for order in 0_u32..1 << 8 {
        let device = device(false);
        let (old, new) = (device(1), device(2));
        let fence = take(&old, 1).unwrap();
        old.power_loss();
        let record = std::cell::Cell::new(1);
        let successor = std::cell::RefCell::new(None);
        let (mut written, mut taken) = (false, false);
        let mut step = 0;
        let steps = |step: &mut u32, written: &mut bool, taken: &mut bool| {
            // Between any two steps of the owner's the successor makes none, one or two of its own.
            for _ in 0..2 {
                if order >> *step & 1 == 1 {
                    if !*written {
                        record.set(2);
                        *written = true;
                    } else if !*taken {
                        *successor.borrow_mut() = Some(take(&new, 2).unwrap());
                        *taken = true;
                    }
                }
                *step += 1;
            }
        };
        let result = {
            let state = std::cell::RefCell::new((&mut step, &mut written, &mut taken));
            fence.again(|| {
                let (step, written, taken) = &mut *state.borrow_mut();
                steps(step, written, taken);
                let ours = record.get() == 1;
                steps(step, written, taken);
                if ours { Ok(()) } else { Err(Error::Owned("superseded".into())) }
            })
        };
        if !written {
            record.set(2);
        }
        if !taken {
            *successor.borrow_mut() = Some(take(&new, 2).unwrap());
        }
        assert!(new.write(2), "{order:b}");
        assert!(!old.write(1), "{order:b}: {result:?}");
    }
}

#[test]
fn what_a_device_says_of_its_reservations_is_read_and_nonsense_is_named() {
    let keys = [&[0, 0, 0, 7, 0, 0, 0, 16][..], &1_u64.to_be_bytes(), &2_u64.to_be_bytes(), &[9; 40]].concat();
    assert_eq!(parse_keys(&keys), Ok(vec![Key(1), Key(2)]));
    let held = [&[0, 0, 0, 7, 0, 0, 0, 16][..], &3_u64.to_be_bytes(), &[0, 0, 0, 0, 0, 5, 0, 0]].concat();
    assert_eq!(parse_held(&held), Ok(Some(Held { key: Key(3), kind: 5 })));
    assert_eq!(parse_held(&[0; 8]), Ok(None));
    assert!(parse_keys(&[0; 7]).is_err() && parse_keys(&[0, 0, 0, 0, 0, 0, 0, 1]).is_err());
    assert!(parse_held(&[0, 0, 0, 0, 0, 0, 0, 1, 5]).is_err());
}
