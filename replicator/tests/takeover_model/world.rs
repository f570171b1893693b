//! What there is in the model: two nodes, the ring between them, the replication link, the board.

/// A node's number: 0 or 1.
pub type Node = usize;

/// Most steps that a machine executes.
pub const MAX_STEPS: usize = 2;

/// What a machine has done since it was booted. Two pasts are the same only if the same generation executed the same step: a
/// step that is executed again after a takeover is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Past {
    /// The generation that booted it.
    pub life: u8,
    /// Steps executed. Each produces one output.
    pub len: u8,
    /// Who executed them.
    pub by: [u8; MAX_STEPS],
}

impl Past {
    /// A machine that was just booted.
    pub fn boot(life: u8) -> Self {
        Self { life, ..Self::default() }
    }

    /// One step more.
    pub fn step(&mut self, generation: u8) {
        self.by[self.len as usize] = generation;
        self.len += 1;
    }

    /// Whether `earlier` is a part of this past.
    pub fn contains(&self, earlier: &Self) -> bool {
        let n = earlier.len as usize;
        self.life == earlier.life && n <= self.len as usize && self.by[..n] == earlier.by[..n]
    }

    /// The first `len` steps of it.
    pub fn first(&self, len: u8) -> Self {
        let mut by = [0; MAX_STEPS];
        by[..len as usize].copy_from_slice(&self.by[..len as usize]);
        Self { life: self.life, len, by }
    }
}

/// A machine's VMM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vm {
    pub generation: u8,
    pub past: Past,
    /// Outputs leave at once.
    pub gate_open: bool,
    /// Steps that a commit has covered, as far as the VMM was told.
    pub committed: u8,
    /// The board has accepted it.
    pub attached: bool,
}

/// The standby's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Image {
    #[default]
    Inconsistent,
    Whole {
        generation: u8,
        past: Past,
    },
    Outdated,
}

/// The sender's knowledge of the veto.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Veto {
    #[default]
    Unknown,
    /// Stored, not yet proven.
    Written,
    Standing,
    /// The hook that lifts it runs.
    Clearing,
    Cleared,
}

/// One node's copy of the cluster's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Cib {
    /// Counts writes. When nodes meet again the higher one wins.
    pub version: u8,
    /// Node attribute `understudy-generation-<machine>`.
    pub generations: [u8; 2],
    /// Node attributes `understudy-ended-<machine>`, the highest: images of generations up to this are of a past life.
    pub ended: u8,
    /// Location constraint `understudy-veto-<machine>`: only this node.
    pub veto: Option<Node>,
}

impl Cib {
    /// Who holds the newest generation.
    pub fn newest(&self) -> (Node, u8) {
        let owner = usize::from(self.generations[1] > self.generations[0]);
        (owner, self.generations[owner])
    }
}

/// How far the fencing of the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fencing {
    #[default]
    No,
    Requested,
    /// The device says that it was done.
    Executed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Host {
    pub on: bool,
    /// Stands still: executes nothing, answers nothing, forgets nothing.
    pub frozen: bool,
    /// The peer is a member of this node's partition.
    pub sees: bool,
    /// The peer was lost and is not known to be dead.
    pub unclean: bool,
    pub quorate: bool,
    pub fencing: Fencing,
    pub cib: Cib,

    pub vm: Option<Vm>,
    /// Promote has stored this generation; nothing runs yet.
    pub promoting: Option<u8>,
    /// The sender's.
    pub veto: Veto,
    /// A hook that lifts the veto has outlived the sender that started it.
    pub orphan: bool,

    pub image: Image,
    /// Generations below are refused by the receiver.
    pub floor: u8,
}

impl Host {
    /// Whether programs run on it.
    pub fn works(&self) -> bool {
        self.on && !self.frozen
    }
}

/// Where a replication connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Greeted; a first copy is needed. `wait`: not before the gate is open.
    Welcomed {
        wait: bool,
    },
    Copying,
    Streaming,
}

/// The replication connection. Its two ends notice a loss each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Conn {
    pub from: Node,
    pub generation: u8,
    pub sender_open: bool,
    pub receiver_open: bool,
    pub phase: Phase,
    /// An epoch that was cut and sent.
    pub wire: Option<Past>,
    /// It has arrived, and is no commit yet.
    pub staged: Option<Past>,
    /// The receiver has committed so many steps and says so.
    pub ack: Option<u8>,
    /// The sender waits for an acknowledgement.
    pub awaiting: bool,
    /// The receiver has said that the cluster knows its image.
    pub promotable: bool,
}

/// The interface board, and through it the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Board {
    /// Highest generation seen.
    pub generation: u8,
    /// The past that the outputs applied so far tell of.
    pub outside: Past,
}

/// What must never happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wrong {
    /// The world saw outputs of two different pasts.
    TwoPasts,
    /// A machine was continued from an image that lacks something which the world has seen.
    StaleTakeover,
    /// A board acted for a generation although it had seen a newer one.
    OldOwnerActed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    pub hosts: [Host; 2],
    /// Corosync's ring.
    pub ring: bool,
    /// The network that replication goes over.
    pub link: bool,
    pub conn: Option<Conn>,
    pub board: Board,
    /// Faults that may still happen.
    pub faults: u8,
    pub wrong: Option<Wrong>,
}

impl World {
    /// Two nodes, one cluster, nothing runs.
    pub fn new(faults: u8) -> Self {
        let host = Host { on: true, sees: true, quorate: true, ..Host::default() };
        Self { hosts: [host; 2], ring: true, link: true, conn: None, board: Board::default(), faults, wrong: None }
    }

    /// Whether the two are one cluster and can hear each other.
    pub fn together(&self) -> bool {
        self.ring && self.hosts.iter().all(|h| h.works() && h.sees)
    }

    /// Whether `node` may change the configuration now. (What it wrote into a dying membership is first brought to the peer.)
    pub fn can_store(&self, node: Node) -> bool {
        let host = &self.hosts[node];
        host.works() && host.quorate && (!self.together() || self.hosts[0].cib == self.hosts[1].cib)
    }

    /// Change the configuration. It succeeds locally even if the peer is gone and nobody has noticed.
    pub fn store(&mut self, node: Node, change: impl FnOnce(&mut Cib)) {
        let mut cib = self.hosts[node].cib;
        change(&mut cib);
        if cib == self.hosts[node].cib {
            return;
        }
        cib.version += 1;
        let together = self.together();
        self.hosts[node].cib = cib;
        if together {
            self.hosts[1 - node].cib = cib;
        }
    }

    /// The machine's sender on `node`, if its connection lives as far as it knows.
    pub fn sending(&self, node: Node) -> Option<&Conn> {
        self.conn.as_ref().filter(|c| c.from == node && c.sender_open)
    }

    /// Whether epochs stream from `node`, as far as it knows.
    pub fn streams(&self, node: Node) -> bool {
        self.sending(node).is_some_and(|c| c.phase == Phase::Streaming)
    }

    /// What the sender's status calls protected.
    pub fn protected(&self, node: Node) -> bool {
        let host = &self.hosts[node];
        self.streams(node) && host.veto == Veto::Cleared && host.vm.is_some_and(|vm| !vm.gate_open)
    }

    /// The machine ends on `node`, with its sender.
    pub fn end_machine(&mut self, node: Node) {
        let host = &mut self.hosts[node];
        host.vm = None;
        host.promoting = None;
        self.end_sender(node);
    }

    /// The sender ends: its connection, and what it knew of the veto.
    pub fn end_sender(&mut self, node: Node) {
        let host = &mut self.hosts[node];
        host.orphan |= host.veto == Veto::Clearing;
        host.veto = Veto::Unknown;
        self.sender_closes(node);
    }

    /// The sender gives its connection up.
    pub fn sender_closes(&mut self, node: Node) {
        if let Some(conn) = self.conn.as_mut().filter(|c| c.from == node) {
            conn.sender_open = false;
            conn.ack = None;
            conn.awaiting = false;
            conn.promotable = false;
            conn.phase = Phase::Streaming;
        }
        if self.hosts[node].veto == Veto::Cleared {
            // It is asked for again before anything else is done.
            self.hosts[node].veto = Veto::Unknown;
        }
        self.forget_conn();
    }

    /// The receiver notices that the connection is gone.
    pub fn receiver_closes(&mut self, node: Node) {
        if let Some(conn) = self.conn.as_mut().filter(|c| c.from != node) {
            conn.receiver_open = false;
            conn.wire = None;
            conn.staged = None;
        }
        self.forget_conn();
    }

    fn forget_conn(&mut self) {
        self.conn = self.conn.filter(|c| c.sender_open || c.receiver_open);
    }

    /// Power gone: what was not in the configuration is lost.
    pub fn cut_power(&mut self, node: Node) {
        self.end_machine(node);
        self.receiver_closes(node);
        self.hosts[node] = Host { cib: self.hosts[node].cib, ..Host::default() };
    }

    /// Only the difference of versions means something: fewer states to look at.
    pub fn normalise(mut self) -> Self {
        let least = self.hosts[0].cib.version.min(self.hosts[1].cib.version);
        for host in &mut self.hosts {
            host.cib.version -= least;
        }
        self
    }
}
