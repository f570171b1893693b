//! Load sharing by priority (spec F-8), as functions of values: which machines of a host run and which wait.
//!
//! A host has room: processors for machines, and memory. Machines are looked at from the highest priority down, those of one
//! priority in the order in which they came. The highest always run, as if they were alone. Any other runs if its vCPUs fit into the
//! processors that those before it leave, and is paused otherwise. Memory is another matter: a paused machine keeps all of it, so
//! pausing gives back processors and nothing else; a machine whose memory does not fit is not started ([`lacks_memory`]).

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

/// What a host has for machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Processors: as many as are to be counted on, which need not be as many as there are.
    pub cpus: u32,
    /// MiB; `None`: not limited here.
    pub memory: Option<u64>,
}

/// What a machine takes of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The machine.
    pub name: String,
    /// Higher goes first, 0 to 10000.
    pub priority: u64,
    /// Its vCPUs.
    pub vcpus: u64,
    /// Its memory in MiB, which it has whether it runs, stands by or is paused.
    pub memory: u64,
    /// When it began to run here, or was prepared: any number that grows with time.
    pub since: u64,
}

/// What becomes of a machine that could run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Share {
    /// It runs.
    Runs,
    /// It is paused for these.
    Waits(Vec<String>),
}

/// Who runs and who waits, of machines that all want to run; in the order in which they were looked at.
pub fn share(room: Room, claims: &[Claim]) -> Vec<(&Claim, Share)> {
    let mut order: Vec<&Claim> = claims.iter().collect();
    order.sort_by_key(|c| (Reverse(c.priority), c.since, &c.name));
    let highest = order.first().map(|c| c.priority);
    let mut free = u64::from(room.cpus);
    let mut shares: Vec<(&Claim, Share)> = Vec::with_capacity(order.len());
    for claim in order {
        let share = if Some(claim.priority) == highest || claim.vcpus <= free {
            free = free.saturating_sub(claim.vcpus);
            Share::Runs
        } else {
            let before = shares.iter().filter(|(_, share)| *share == Share::Runs);
            Share::Waits(before.map(|(other, _)| other.name.clone()).collect())
        };
        shares.push((claim, share));
    }
    shares
}

/// How many MiB are missing for `new` beside the others, whose memory is taken whatever they do.
pub fn lacks_memory(room: Room, others: &[Claim], new: &Claim) -> Option<u64> {
    let taken = others.iter().fold(0_u64, |sum, c| sum.saturating_add(c.memory));
    let wanted = taken.saturating_add(new.memory);
    room.memory.filter(|memory| wanted > *memory).map(|memory| wanted - memory)
}

/// Read `NODE=CPUS[/MIB]`, separated by blanks.
pub fn rooms(text: &str) -> Result<Vec<(String, Room)>, String> {
    text.split_whitespace()
        .map(|word| {
            let wrong = || format!("has \"{word}\": write NODE=CPUS or NODE=CPUS/MIB, separated by blanks");
            let (node, room) = word.split_once('=').filter(|(node, _)| !node.is_empty()).ok_or_else(wrong)?;
            let (cpus, memory) = match room.split_once('/') {
                Some((cpus, memory)) => (cpus, Some(memory.parse().map_err(|_| wrong())?)),
                None => (room, None),
            };
            let cpus = cpus.parse().ok().filter(|cpus| *cpus > 0).ok_or_else(wrong)?;
            Ok((node.to_owned(), Room { cpus, memory }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(name: &str, priority: u64, vcpus: u64, since: u64) -> Claim {
        Claim { name: name.into(), priority, vcpus, memory: 512, since }
    }

    fn running(room: Room, claims: &[Claim]) -> Vec<String> {
        let shares = share(room, claims);
        shares.into_iter().filter(|(_, s)| *s == Share::Runs).map(|(c, _)| c.name.clone()).collect()
    }

    const FOUR: Room = Room { cpus: 4, memory: Some(1024) };

    #[test]
    fn who_is_more_important_pauses_who_is_less_until_there_is_room() {
        let low = [claim("a", 0, 2, 1), claim("b", 0, 2, 2)];
        assert_eq!(running(FOUR, &low), ["a", "b"]);
        let mut all = low.to_vec();
        all.push(claim("high", 9, 2, 3));
        assert_eq!(running(FOUR, &all), ["high", "a"], "one of them is enough; who came last waits");
        all[2].vcpus = 4;
        assert_eq!(running(FOUR, &all), ["high"]);
        assert_eq!(share(FOUR, &all)[2].1, Share::Waits(vec!["high".into()]));
        all.pop();
        assert_eq!(running(FOUR, &all), ["a", "b"]);
    }

    #[test]
    fn equals_share_a_host_as_they_did_before_there_were_priorities() {
        let many: Vec<Claim> = (0..9).map(|i| claim(&i.to_string(), 5, 3, i)).collect();
        assert_eq!(running(FOUR, &many).len(), 9);
    }

    #[test]
    fn memory_is_counted_whoever_runs() {
        let others = [claim("a", 0, 1, 1)];
        assert_eq!(lacks_memory(FOUR, &others, &claim("b", 9, 1, 2)), None);
        let big = Claim { memory: 513, ..claim("b", 9, 1, 2) };
        assert_eq!(lacks_memory(FOUR, &others, &big), Some(1));
        assert_eq!(lacks_memory(Room { memory: None, ..FOUR }, &others, &big), None);
        let absurd = Claim { memory: u64::MAX, ..big };
        assert!(lacks_memory(FOUR, &[absurd.clone(), absurd.clone()], &absurd).is_some());
    }

    #[test]
    fn rooms_are_read() {
        let read = rooms("n1=4/2048  n2=16").unwrap();
        assert_eq!(
            read,
            [("n1".into(), Room { cpus: 4, memory: Some(2048) }), ("n2".into(), Room { cpus: 16, memory: None })]
        );
        for wrong in ["n1", "=4", "n1=0", "n1=x", "n1=4/", "n1=4/x"] {
            assert!(rooms(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    prop_compose! {
        fn claims()(parts in proptest::collection::vec((0_u64..4, 1_u64..9, 0_u64..6), 0..10)) -> Vec<Claim> {
            parts.into_iter().enumerate().map(|(i, (priority, vcpus, since))| claim(&format!("m{i}"), priority, vcpus, since)).collect()
        }
    }

    proptest! {
        #[test]
        fn the_most_important_always_run_and_nobody_below_takes_what_they_need(claims in claims(), cpus in 1_u32..20) {
            let room = Room { cpus, memory: None };
            let shares = share(room, &claims);
            prop_assert_eq!(shares.len(), claims.len());
            let highest = claims.iter().map(|c| c.priority).max();
            let (mut top, mut below) = (0, 0);
            for (claim, share) in &shares {
                if Some(claim.priority) == highest {
                    prop_assert_eq!(share, &Share::Runs);
                    top += claim.vcpus;
                } else if *share == Share::Runs {
                    below += claim.vcpus;
                }
            }
            prop_assert!(below <= u64::from(cpus).saturating_sub(top));
        }

        #[test]
        fn nobody_waits_who_would_fit_and_whom_one_waits_for_is_no_less_important(claims in claims(), cpus in 1_u32..20) {
            let room = Room { cpus, memory: None };
            let shares = share(room, &claims);
            let mut used = 0;
            for (claim, share) in &shares {
                match share {
                    Share::Runs => used += claim.vcpus,
                    Share::Waits(whom) => {
                        prop_assert!(used + claim.vcpus > u64::from(cpus));
                        for name in whom {
                            let other = claims.iter().find(|c| c.name == *name).unwrap();
                            prop_assert!(other.priority >= claim.priority);
                        }
                        prop_assert!(!whom.is_empty());
                    }
                }
            }
        }

        #[test]
        fn it_does_not_matter_who_is_asked_first(claims in claims(), cpus in 1_u32..20, turn in 0_usize..10) {
            let room = Room { cpus, memory: None };
            let mut turned = claims.clone();
            turned.rotate_left(turn % claims.len().max(1));
            prop_assert_eq!(running(room, &claims), running(room, &turned));
        }

        #[test]
        fn whoever_arrives_changes_nothing_for_its_equals_and_betters(claims in claims(), cpus in 1_u32..20, priority in 0_u64..4, vcpus in 1_u64..9) {
            let room = Room { cpus, memory: None };
            let before = running(room, &claims);
            let mut with = claims.clone();
            with.push(claim("new", priority, vcpus, 100));
            let after = running(room, &with);
            for claim in claims.iter().filter(|c| c.priority >= priority) {
                prop_assert_eq!(before.contains(&claim.name), after.contains(&claim.name), "{:?}", claim);
            }
        }
    }
}
