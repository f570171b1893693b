//! One node's monitor as a state machine: heartbeats, the membership and time go in; heartbeats and what has changed come out.
//!
//! ```text
//!   heard(plane, heartbeat)  members(…)  own(machines)
//!            └───────────────────┬──────────┘
//!   tick(now) ───────────────────┴──► send this heartbeat · these verdicts are new · this node is cut off (or not any more)
//! ```
//! What must hold: without the membership nothing is judged; nothing is judged before everybody has had time to be heard; a change
//! counts when it was seen several times in a row ([`Config::samples`]), and not while heartbeats have only begun to fail; what came is of this node's key and newer than what came
//! before. Time is milliseconds of any clock that does not go back.

use std::collections::{BTreeMap, BTreeSet};

use crate::matrix::{Bmc, Guest, Machine, Management, Matrix, Observation, Production, Restart, Verdict};
use crate::members::Member;
use crate::report::{Judged, Report};
use crate::scope::{Hears, scopes};
use crate::wire::{Heartbeat, MachineSeen, Plane};

/// What a monitor is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node.
    pub node: String,
    /// Every node that is monitored, this one included, and its rack.
    pub nodes: BTreeMap<String, Option<String>>,
    /// A heartbeat every so many ms.
    pub interval_ms: u64,
    /// So many heartbeats that do not come are silence.
    pub missed: u32,
    /// So many times in a row the same must be seen before it counts.
    pub samples: u32,
    /// For so long the cluster may restart what is wrong on its node before that counts as failed, ms.
    pub restart_ms: u64,
    /// What follows from what.
    pub matrix: Matrix,
}

impl Config {
    fn silence(&self) -> u64 {
        self.interval_ms.saturating_mul(u64::from(self.missed.max(1)))
    }
}

/// Something that the executable has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Send this to every other node, over both planes (the plane is filled in by who sends it).
    Beat(Heartbeat),
    /// What follows from what is seen has changed.
    Changed {
        /// As it is now.
        now: Judged,
        /// What followed before.
        was: Verdict,
        /// Whether this node speaks for all.
        speaks: bool,
    },
    /// How this node is connected to the production network has changed.
    Connected(Production),
}

#[derive(Debug, Default)]
struct Peer {
    last: BTreeMap<Plane, (u64, u64)>,
    heard: BTreeMap<Plane, u64>,
    hears: BTreeSet<String>,
    machines: Vec<MachineSeen>,
    bmc: BTreeMap<String, Bmc>,
}

impl Peer {
    fn fresh(&self, plane: Option<Plane>, now: u64, silence: u64) -> bool {
        self.heard.iter().any(|(p, at)| plane.is_none_or(|plane| plane == *p) && now.saturating_sub(*at) < silence)
    }
}

type Subject = (String, Option<String>);

/// What is known of a node or a machine.
#[derive(Debug)]
struct Seen {
    /// What counts: it was seen several times in a row.
    counts: Option<Observation>,
    /// Since when.
    since: u64,
    next: Observation,
    times: u32,
    /// Since when it has been wrong in a way that a restart could help against.
    ill: Option<u64>,
}

/// The monitor of one node.
#[derive(Debug)]
pub struct Watch {
    config: Config,
    began: u64,
    number: u64,
    started: Option<u64>,
    peers: BTreeMap<String, Peer>,
    members: Option<BTreeMap<String, Member>>,
    own: Vec<MachineSeen>,
    bmc: BTreeMap<String, Bmc>,
    /// Those that were lost, and whose end the cluster has confirmed since.
    fenced: BTreeSet<String>,
    seen: BTreeMap<Subject, Seen>,
    connected: Option<Production>,
}

impl Watch {
    /// A monitor whose process began at `began` (ms since 1970: later lives of this node's monitor must have larger ones).
    pub fn new(config: Config, began: u64) -> Self {
        let peers = config.nodes.keys().filter(|n| **n != config.node).map(|n| (n.clone(), Peer::default())).collect();
        Self {
            config,
            began,
            number: 0,
            started: None,
            peers,
            members: None,
            own: Vec::new(),
            bmc: BTreeMap::new(),
            fenced: BTreeSet::new(),
            seen: BTreeMap::new(),
            connected: None,
        }
    }

    /// A heartbeat has come, with the right key. False if it says nothing new, or is nobody's who is monitored.
    pub fn heard(&mut self, now: u64, plane: Plane, beat: Heartbeat) -> bool {
        let Some(peer) = self.peers.get_mut(&beat.node) else { return false };
        // A heartbeat that comes over another network than it was sent over has been carried there by somebody.
        if beat.plane != plane || !beat.newer_than(peer.last.get(&plane).copied()) {
            return false;
        }
        let newest = beat.newer_than(peer.last.values().max().copied());
        peer.last.insert(plane, (beat.began, beat.number));
        peer.heard.insert(plane, now);
        if newest {
            peer.hears = beat.hears.into_iter().collect();
            peer.machines = beat.machines;
            peer.bmc = beat.bmc;
        }
        true
    }

    /// The membership, or that it cannot be known now.
    pub fn members(&mut self, members: Option<BTreeMap<String, Member>>) {
        for (name, member) in members.iter().flatten() {
            match member {
                Member::Online => {
                    self.fenced.remove(name);
                    self.bmc.remove(name);
                }
                Member::Lost => drop(self.fenced.insert(name.clone())),
                Member::Left => {}
            }
        }
        self.members = members;
    }

    /// Hosts whose management controllers this node is to ask now: those that are no members and did not leave, if it is the one that speaks.
    /// What the cluster has confirmed needs no question.
    pub fn to_ask(&self, now: u64) -> Vec<String> {
        let Some(members) = self.members.as_ref().filter(|m| self.speaker(m, now) == Some(&self.config.node)) else {
            return Vec::new();
        };
        let lost = |name: &&String| !matches!(members.get(*name), Some(Member::Online | Member::Left));
        self.config.nodes.keys().filter(|name| **name != self.config.node).filter(lost).cloned().collect()
    }

    /// The machines of this node.
    pub fn own(&mut self, machines: Vec<MachineSeen>) {
        self.own = machines;
    }

    /// What a host's management controller has said to this node. Forgotten when the host is a member again.
    pub fn bmc(&mut self, node: &str, bmc: Bmc) {
        self.bmc.insert(node.to_owned(), bmc);
    }

    /// What counts of a host's management controller: what it says to the node that speaks. A fence that the cluster has confirmed says `off` as well.
    fn power(&self, node: &str, members: &BTreeMap<String, Member>, now: u64) -> Bmc {
        match members.get(node) {
            Some(Member::Online) => return Bmc::Unknown,
            Some(Member::Left) => return Bmc::Off,
            _ => {}
        }
        let speaker = self.speaker(members, now);
        let said = match speaker.and_then(|speaker| self.peers.get(speaker)) {
            Some(peer) => &peer.bmc,
            None => &self.bmc,
        };
        said.get(node).copied().unwrap_or(Bmc::Unknown)
    }

    fn hears(&self, now: u64) -> BTreeSet<String> {
        let silence = self.config.silence();
        let fresh = self.peers.iter().filter(|(_, peer)| peer.fresh(Some(Plane::Production), now, silence));
        fresh.map(|(name, _)| name.clone()).collect()
    }

    /// Time has passed: once every interval.
    pub fn tick(&mut self, now: u64) -> Vec<Event> {
        let started = *self.started.get_or_insert(now);
        self.number += 1;
        let hears = self.hears(now);
        let mut events = vec![Event::Beat(Heartbeat {
            node: self.config.node.clone(),
            began: self.began,
            number: self.number,
            plane: Plane::Production,
            hears: hears.iter().cloned().collect(),
            machines: self.own.clone(),
            left_out: 0,
            bmc: self.bmc.clone(),
        })];
        let Some(members) = self.members.clone() else { return events };
        if now.saturating_sub(started) < self.config.silence() + self.config.interval_ms {
            return events;
        }
        let silence = self.config.silence();
        let mut who: Hears = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.fresh(None, now, silence))
            .map(|(name, peer)| (name.clone(), peer.hears.clone()))
            .collect();
        who.insert(self.config.node.clone(), hears);
        // Who has left has no say in how large the network is. Who was fenced is judged all the same: it may be heard.
        let without = |gone: &dyn Fn(&String) -> bool| {
            let nodes = self.config.nodes.iter().filter(|(n, _)| !gone(n));
            nodes.map(|(n, r)| (n.clone(), r.clone())).collect::<BTreeMap<String, Option<String>>>()
        };
        let left = |name: &String| members.get(name) == Some(&Member::Left);
        let mut production = scopes(&without(&|name| left(name) && !self.fenced.contains(name)), &who);
        production.extend(scopes(&without(&left), &who));
        let speaks = self.speaker(&members, now) == Some(&self.config.node);
        let mut current: BTreeSet<Subject> = BTreeSet::new();
        for (node, scope) in &production {
            for (machine, observation) in self.observe(node, *scope, &members, now) {
                let subject = (node.clone(), machine);
                current.insert(subject.clone());
                // The membership may be quicker than silence: who may have just died is not said to be heard yet.
                if self.in_doubt(node, now) {
                    continue;
                }
                // A fence that was confirmed of a host that is silent is no matter of samples.
                let heard = self.peers.get(node).is_none_or(|peer| peer.fresh(None, now, silence));
                let samples = if left(node) && !heard { 1 } else { self.config.samples };
                events.extend(self.count(subject, observation, samples, now, speaks));
            }
        }
        // A machine that its node does not speak of any more is not there any more; a node that left by itself is not judged.
        self.seen.retain(|subject, _| current.contains(subject));
        let own = self.seen.get(&(self.config.node.clone(), None)).and_then(|seen| seen.counts).map(|o| o.production);
        if let Some(own) = own
            && self.connected != Some(own)
        {
            self.connected = Some(own);
            events.push(Event::Connected(own));
        }
        events
    }

    /// Heartbeats have begun to fail, and it is not silence yet.
    fn in_doubt(&self, node: &str, now: u64) -> bool {
        let age = self.peers.get(node).and_then(|peer| peer.heard.values().max()).map(|at| now.saturating_sub(*at));
        age.is_some_and(|age| age >= 2 * self.config.interval_ms && age < self.config.silence())
    }

    /// What is seen of a node and of each of its machines, as if nothing had been restarted.
    fn observe(
        &self,
        node: &str,
        production: Production,
        members: &BTreeMap<String, Member>,
        now: u64,
    ) -> Vec<(Option<String>, Observation)> {
        let management = if members.get(node) == Some(&Member::Online) { Management::Up } else { Management::Down };
        let bmc = self.power(node, members, now);
        let (fresh, machines) = match self.peers.get(node) {
            Some(peer) => (peer.fresh(None, now, self.config.silence()), &peer.machines),
            None => (true, &self.own),
        };
        // A monitor that is silent says nothing of its network: that is in question only if its heartbeats come at all.
        let production = if fresh || management == Management::Down { production } else { Production::Up };
        let unheard = if management == Management::Up { Machine::Silent } else { Machine::Unknown };
        let one =
            |machine, guest| Observation { management, production, bmc, machine, guest, restart: Restart::Untried };
        let itself = one(if fresh { Machine::Running } else { unheard }, Guest::Unwatched);
        let of_machines = machines.iter().map(|seen| {
            let what = if fresh { one(seen.machine, seen.guest) } else { one(unheard, Guest::Unwatched) };
            (Some(seen.name.clone()), what)
        });
        std::iter::once((None, itself)).chain(of_machines).collect()
    }

    /// Count what is seen; an event if what follows from it has changed.
    fn count(
        &mut self,
        subject: Subject,
        mut observed: Observation,
        samples: u32,
        now: u64,
        speaks: bool,
    ) -> Option<Event> {
        let fresh = Seen { counts: None, since: now, next: observed, times: 0, ill: None };
        let seen = self.seen.entry(subject.clone()).or_insert(fresh);
        let ill = matches!(observed.machine, Machine::Dead | Machine::Silent) || observed.guest == Guest::Down;
        seen.ill = ill.then(|| seen.ill.unwrap_or(now));
        if seen.ill.is_some_and(|since| now.saturating_sub(since) >= self.config.restart_ms) {
            observed.restart = Restart::Failed;
        }
        if seen.next != observed {
            (seen.next, seen.times) = (observed, 0);
        }
        seen.times = seen.times.saturating_add(1);
        if seen.times < samples || seen.counts == Some(observed) {
            return None;
        }
        let was = seen.counts.map_or(Verdict::Nothing, |before| self.config.matrix.judge(&before));
        (seen.counts, seen.since) = (Some(observed), now);
        if self.config.matrix.judge(&observed) == was {
            return None;
        }
        Some(Event::Changed { now: self.judged(&subject, now)?, was, speaks })
    }

    fn judged(&self, subject: &Subject, now: u64) -> Option<Judged> {
        let (node, machine) = subject.clone();
        let seen = self.seen.get(subject)?;
        let observation = seen.counts?;
        let row = self.config.matrix.row(&observation).map_or("-", |row| &row.name).to_owned();
        let verdict = self.config.matrix.judge(&observation);
        Some(Judged { node, machine, observation, row, verdict, for_ms: now.saturating_sub(seen.since) })
    }

    /// The first of those that are members and heard over any network; this node hears itself.
    fn speaker<'a>(&'a self, members: &BTreeMap<String, Member>, now: u64) -> Option<&'a String> {
        let heard = |name: &String| {
            *name == self.config.node
                || self.peers.get(name).is_some_and(|peer| peer.fresh(None, now, self.config.silence()))
        };
        self.config.nodes.keys().find(|name| members.get(*name) == Some(&Member::Online) && heard(name))
    }

    /// How everything looks from here.
    pub fn report(&self, now: u64) -> Report {
        let waits_for = match (&self.members, self.started) {
            (None, _) => Some("the cluster's membership (crm_mon) is not known".to_owned()),
            (Some(_), started) => {
                let judges_at = started.unwrap_or(now) + self.config.silence() + self.config.interval_ms;
                (now < judges_at).then(|| "the others have not had time to be heard".to_owned())
            }
        };
        let speaks = self.members.as_ref().is_some_and(|m| self.speaker(m, now) == Some(&self.config.node));
        let judged = match waits_for {
            None => self.seen.keys().filter_map(|subject| self.judged(subject, now)).collect(),
            Some(_) => Vec::new(),
        };
        Report { node: self.config.node.clone(), speaks, waits_for, judged, refused: 0, last_refused: None }
    }
}
