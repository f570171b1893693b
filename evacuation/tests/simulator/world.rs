//! A cluster that is as bad as it can be: hosts die or are only cut off, fences are late or never come, starts fail, controllers are
//! killed, operators change their minds. And a "Pacemaker" that asks no questions: it starts a machine wherever its score is, and stops it
//! wherever it has none. What keeps a machine from running twice here is the controller alone.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use understudy_crm::estate::Mode;
use understudy_crm::policy::Policy;
use understudy_crm::records::Records;
use understudy_evacuation::core::model::{ApprovalState, Finding, Host, MachineNow, Snapshot};
use understudy_monitor::matrix::{Observation, Verdict};

/// A host as it really is.
#[derive(Debug, Clone)]
pub struct RealHost {
    /// It has power, whatever the cluster believes.
    pub alive: bool,
    /// What the cluster believes.
    pub seen: Host,
    /// Seconds until the fence succeeds; `None`: never.
    pub fence_in: Option<u64>,
    /// Seconds until it is up again.
    pub boots_in: u64,
}

/// What must never be seen. The test ends with it.
pub type Violation = String;

pub struct World {
    pub policy: Policy,
    pub rng: Rng,
    pub now: u64,
    /// Counts every change that the cluster sees.
    pub version: u64,
    pub hosts: Vec<RealHost>,
    pub load: Vec<Option<u32>>,
    /// Where copies of each machine really run.
    pub copies: Vec<BTreeSet<usize>>,
    /// Copies that are being started: machine, node, seconds left.
    pub starting: Vec<(usize, usize, u64)>,
    /// Live migrations: machine, from, to, seconds left.
    pub migrating: Vec<(usize, usize, usize, u64)>,
    /// A live migration has failed, and Pacemaker leaves the machine alone until somebody has seen to it.
    pub blocked: Vec<bool>,
    pub wishes: Vec<BTreeMap<usize, i32>>,
    pub failed: Vec<BTreeSet<usize>>,
    pub quorum: bool,
    pub maintenance: bool,
    pub links: Option<(usize, usize)>,
    /// What the monitors say, right or wrong, and since when (in the place of how long).
    pub findings: Option<Vec<Finding>>,
    pub records: Records,
    pub approvals: BTreeMap<String, ApprovalState>,
    /// Chance of a start to fail, percent.
    pub bad_starts: u8,
}

impl World {
    pub fn new(policy: Policy, mut rng: Rng) -> Self {
        let up = RealHost { alive: true, seen: Host::Up, fence_in: None, boots_in: 0 };
        let placed = understudy_crm::placement::place(&policy);
        let mut copies = vec![BTreeSet::new(); policy.machines.len()];
        let mut wishes = vec![BTreeMap::new(); policy.machines.len()];
        let mut free: Vec<i128> = policy.nodes.iter().map(|n| n.memory.map_or(1 << 40, i128::from)).collect();
        for (m, placed) in placed.iter().enumerate() {
            wishes[m] = placed.targets.iter().map(|t| (t.node, t.score)).collect();
            let Some(home) = placed.home() else { continue };
            free[home] -= i128::from(policy.machines[m].memory);
            if free[home] >= 0 {
                copies[m].insert(home);
            }
        }
        let bad_starts = if rng.bool() { 0 } else { rng.u8(0..40) };
        Self {
            hosts: vec![up; policy.nodes.len()],
            load: vec![None; policy.nodes.len()],
            failed: vec![BTreeSet::new(); policy.machines.len()],
            copies,
            wishes,
            starting: Vec::new(),
            migrating: Vec::new(),
            blocked: vec![false; policy.machines.len()],
            policy,
            rng,
            now: 1_000_000,
            version: 0,
            quorum: true,
            maintenance: false,
            links: Some((2, 2)),
            findings: None,
            records: Records::default(),
            approvals: BTreeMap::new(),
            bad_starts,
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        let nodes = |m: usize| {
            let starting = self.starting.iter().filter(move |s| s.0 == m).map(|s| s.1);
            let arriving = self.migrating.iter().filter(move |s| s.0 == m).map(|s| s.2);
            self.copies[m].iter().copied().chain(starting).chain(arriving)
        };
        let machine = |m: usize| {
            // A copy on a host that was fenced is known to be gone; one on a host that was lost is not.
            let on: Vec<usize> = nodes(m).filter(|n| self.hosts[*n].seen != Host::Down).collect();
            let runs = self.copies[m].iter().copied().find(|n| matches!(self.hosts[*n].seen, Host::Up | Host::Leaving));
            MachineNow {
                wanted: !self.blocked[m],
                migrating: self.migrating.iter().any(|s| s.0 == m),
                on,
                runs: runs.filter(|_| !self.blocked[m]),
                wishes: self.wishes[m].iter().map(|(n, s)| (*n, *s)).collect(),
                failed: self.failed[m].iter().copied().collect(),
            }
        };
        Snapshot {
            now: self.now,
            here: "n0".into(),
            quorum: self.quorum,
            maintenance: self.maintenance,
            links: self.links,
            health: false,
            findings: self
                .findings
                .as_ref()
                .map(|all| all.iter().map(|f| Finding { lasts: self.now - f.lasts, ..f.clone() }).collect()),
            hosts: self.hosts.iter().map(|h| h.seen).collect(),
            load: self.load.clone(),
            machines: (0..self.policy.machines.len()).map(machine).collect(),
            records: self.records.clone(),
            approvals: self.approvals.clone(),
        }
    }

    /// Something bad happens, or something good.
    pub fn disturb(&mut self) {
        let n = self.rng.usize(0..self.hosts.len());
        match self.rng.u8(0..15) {
            0..=3 if self.hosts[n].seen == Host::Up => {
                // Dead, or only cut off and running on.
                self.hosts[n].alive = self.rng.bool();
                self.hosts[n].seen = Host::Unclean;
                self.hosts[n].fence_in = if self.rng.u8(0..10) == 0 { None } else { Some(self.rng.u64(0..40)) };
                self.hosts[n].boots_in = self.rng.u64(0..400);
            }
            4 => {
                let Some(rack) = self.policy.nodes[n].rack.clone() else { return };
                for h in 0..self.hosts.len() {
                    if self.policy.nodes[h].rack.as_ref() == Some(&rack) && self.hosts[h].seen == Host::Up {
                        let boots_in = self.rng.u64(0..400);
                        let fence_in = Some(self.rng.u64(0..40));
                        self.hosts[h] = RealHost { alive: false, seen: Host::Unclean, fence_in, boots_in };
                    }
                }
            }
            5 if self.hosts[n].seen == Host::Up => self.hosts[n].seen = Host::Leaving,
            6 if self.hosts[n].seen == Host::Leaving => self.hosts[n].seen = Host::Up,
            7 => self.quorum = !self.quorum,
            8 => self.maintenance = self.rng.u8(0..6) == 0,
            9 => self.links = *self.rng.choice(&[Some((2, 2)), Some((2, 2)), Some((1, 2)), None]).unwrap_or(&None),
            10 => self.load[n] = Some(self.rng.u32(0..100)),
            11 => {
                let m = self.rng.usize(0..self.copies.len());
                // The machine dies by itself; now and then it has done so too often.
                if let Some(node) = self.copies[m].iter().copied().next().filter(|n| self.hosts[*n].seen == Host::Up) {
                    self.copies[m].remove(&node);
                    if self.rng.bool() {
                        self.failed[m].insert(node);
                    }
                }
            }
            12..=14 => return self.find(n),
            _ => return,
        }
        self.version += 1;
    }

    /// The monitors find something else, which need not be true. That is no change of the cluster.
    fn find(&mut self, node: usize) {
        let findings = self.findings.get_or_insert_default();
        match self.rng.u8(0..8) {
            0 => self.findings = None,
            1 => findings.clear(),
            _ => {
                let machine = self.rng.bool().then(|| self.rng.usize(0..self.copies.len()));
                let runs = machine.and_then(|m| self.copies[m].first().copied());
                // Mostly of where it is.
                let node = runs.filter(|_| self.rng.u8(0..4) > 0).unwrap_or(node);
                let any = *self.rng.choice(Verdict::ALL).unwrap_or(&Verdict::Nothing);
                let verdict = if self.rng.bool() { Verdict::Move } else { any };
                let seen = Observation::all().nth(self.rng.usize(0..700)).expect("there are as many");
                let row = format!("r{}", self.rng.u8(0..2));
                findings.retain(|f| (f.node, f.machine) != (node, machine));
                findings.push(Finding { node, machine, seen, row, verdict, lasts: self.now });
            }
        }
    }

    /// All is well again, as far as it can be: what is dead stays dead.
    pub fn calm(&mut self) {
        (self.quorum, self.maintenance, self.links, self.bad_starts) = (true, false, Some((2, 2)), 0);
        self.findings = Some(Vec::new());
        self.blocked.fill(false);
        self.version += 1;
    }

    /// A second passes.
    pub fn tick(&mut self) -> Result<(), Violation> {
        self.now += 1;
        for n in 0..self.hosts.len() {
            let host = &mut self.hosts[n];
            match (host.seen, host.fence_in) {
                (Host::Unclean, Some(0)) => {
                    (host.alive, host.seen) = (false, Host::Down);
                    self.version += 1;
                }
                (Host::Unclean, Some(left)) => host.fence_in = Some(left - 1),
                (Host::Down, _) if host.boots_in == 0 => {
                    (host.alive, host.seen) = (true, Host::Joining);
                    self.version += 1;
                }
                (Host::Down, _) => host.boots_in -= 1,
                (Host::Joining, _) => {
                    host.seen = Host::Up;
                    self.version += 1;
                    for failed in &mut self.failed {
                        failed.remove(&n);
                    }
                }
                _ => {}
            }
            if !self.hosts[n].alive {
                // Nobody sees this happen on an unclean host: the snapshot shows where it last was.
                if self.hosts[n].seen == Host::Down {
                    for (copies, blocked) in self.copies.iter_mut().zip(&mut self.blocked) {
                        *blocked &= !copies.remove(&n);
                    }
                }
                self.starting.retain(|s| s.1 != n);
                self.migrating.retain(|s| s.1 != n && s.2 != n);
            }
        }
        self.pacemaker()?;
        for (m, copies) in self.copies.iter().enumerate() {
            let alive: Vec<usize> = copies.iter().copied().filter(|n| self.hosts[*n].alive).collect();
            if alive.len() > 1 {
                return Err(format!("two copies of machine {m}, on {alive:?}"));
            }
        }
        Ok(())
    }

    fn pacemaker(&mut self) -> Result<(), Violation> {
        if self.maintenance || !self.quorum {
            return Ok(());
        }
        for at in (0..self.starting.len()).rev() {
            let (m, n, left) = self.starting[at];
            if left > 0 {
                self.starting[at].2 -= 1;
                continue;
            }
            self.starting.remove(at);
            self.version += 1;
            if self.rng.u8(0..100) < self.bad_starts {
                self.failed[m].insert(n);
            } else {
                self.copies[m].insert(n);
            }
        }
        self.migrations()?;
        for m in (0..self.copies.len()).filter(|m| !self.blocked[*m]).collect::<Vec<_>>() {
            for n in self.copies[m].clone() {
                match self.hosts[n].seen {
                    Host::Up if !self.wishes[m].contains_key(&n) => {
                        return Err(format!("machine {m} is stopped on {n}, though its host lives"));
                    }
                    // An operator wanted it.
                    Host::Leaving => {
                        self.copies[m].remove(&n);
                        self.version += 1;
                    }
                    _ => {}
                }
            }
            let active = self.copies[m].iter().any(|n| matches!(self.hosts[*n].seen, Host::Up | Host::Leaving))
                || self.starting.iter().any(|s| s.0 == m);
            if active {
                continue;
            }
            let may = |n: &usize| self.hosts[*n].seen == Host::Up && !self.failed[m].contains(n);
            let mut wishes: Vec<(i32, usize)> =
                self.wishes[m].iter().filter(|(n, _)| may(n)).map(|(n, score)| (-score, *n)).collect();
            wishes.sort_unstable();
            // It asks no question about where else the machine may be: but for machines that are its own alone.
            // And for those that it is moving.
            let own = !self.policy.held(&self.policy.machines[m]) || self.wishes[m].len() > 1;
            let elsewhere = self.copies[m].iter().any(|n| self.hosts[*n].seen == Host::Unclean);
            if own && elsewhere {
                continue;
            }
            for (_, n) in wishes {
                if self.make_room(m, n) {
                    let delay = self.rng.u64(0..6);
                    self.starting.push((m, n, delay));
                    self.version += 1;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Whoever is wanted elsewhere more than where it runs moves there live, and where it cannot it would be stopped.
    fn migrations(&mut self) -> Result<(), Violation> {
        for at in (0..self.migrating.len()).rev() {
            let (m, from, to, left) = self.migrating[at];
            if self.hosts[from].seen != Host::Up || self.hosts[to].seen != Host::Up {
                self.migrating.remove(at);
            } else if left > 0 {
                self.migrating[at].3 -= 1;
                continue;
            } else {
                self.migrating.remove(at);
                if self.rng.u8(0..100) < self.bad_starts {
                    self.blocked[m] = true;
                } else if self.copies[m].remove(&from) {
                    self.copies[m].insert(to);
                }
            }
            self.version += 1;
        }
        for m in 0..self.copies.len() {
            let [n] = self.copies[m].iter().copied().collect::<Vec<_>>()[..] else { continue };
            let busy = self.blocked[m] || self.migrating.iter().any(|s| s.0 == m) || self.hosts[n].seen != Host::Up;
            let Some(here) = self.wishes[m].get(&n).copied().filter(|_| !busy) else { continue };
            let better = self.wishes[m].iter().find(|(to, score)| {
                **score > here + 5000 && self.hosts[**to].seen == Host::Up && !self.failed[m].contains(to)
            });
            let Some(to) = better.map(|(to, _)| *to) else { continue };
            if !self.policy.machines[m].migrates() {
                return Err(format!("machine {m} is stopped on {n} to be started on {to}, though all is well"));
            }
            if self.make_room(m, to) {
                let delay = self.rng.u64(0..80);
                self.migrating.push((m, n, to, delay));
                self.version += 1;
            }
        }
        Ok(())
    }

    /// Room for the machine, by stopping what is less important if need be: the declared preemption.
    fn make_room(&mut self, m: usize, n: usize) -> bool {
        let Some(memory) = self.policy.nodes[n].memory.filter(|_| self.policy.knows_capacity()) else { return true };
        let machine = |m: usize| &self.policy.machines[m];
        let mut there: Vec<usize> = (0..self.copies.len()).filter(|x| self.copies[*x].contains(&n)).collect();
        let starting: u64 = self.starting.iter().filter(|s| s.1 == n).map(|s| machine(s.0).memory).sum();
        there.sort_by_key(|x| machine(*x).priority());
        let mut used: u64 = starting + there.iter().map(|x| machine(*x).memory).sum::<u64>() + machine(m).memory;
        let mut victims = Vec::new();
        for x in there.into_iter().filter(|x| machine(*x).priority() < machine(m).priority()) {
            if used <= memory {
                break;
            }
            used -= machine(x).memory;
            victims.push(x);
        }
        if used > memory {
            return false;
        }
        for x in victims {
            self.copies[x].remove(&n);
        }
        true
    }

    pub fn mode(&self, m: usize) -> Mode {
        self.policy.machines[m].mode()
    }
}
