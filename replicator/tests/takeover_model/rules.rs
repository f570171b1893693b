//! What can happen, and what follows. One action is one step of one process, or one thing that befalls them.

mod cluster;
mod replication;

use cluster::{membership, repair};

use super::world::*;

/// A rule that is left out, to see that the checker notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// The gate opens as soon as the standby is lost.
    GateOpensWithoutVeto,
    /// A veto counts as soon as the local write has succeeded.
    VetoCountsWhenWritten,
    /// The board takes output from whoever sends it.
    BoardTakesAnyGeneration,
    /// The acknowledgement is sent when an epoch has arrived, before it is committed.
    AckBeforeCommit,
    /// A lost node counts as dead before it was fenced.
    LostCountsAsDead,
    /// A takeover goes on under the generation that it found.
    GenerationStays,
    /// A cold boot leaves the images of the machine's past life as they are.
    ColdBootSparesImages,
    /// A node that is to boot the machine waits for another that holds an image, though the veto keeps that from running.
    VetoedImageBlocks,
    /// A machine whose generation the configuration has lost counts as superseded by an older one.
    LostGenerationEnds,
    /// A hook may impose the veto while one that lifts it, and has outlived its sender, still runs.
    HooksOverlap,
    /// A lift that is answered after its stream has ended counts for the next stream.
    LateLiftCounts,
}

/// Where the checker begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Two nodes up, one cluster, nothing runs.
    Boot,
    /// The machine runs on node 0; node 1 has committed the first copy; the veto stands still.
    FirstCopy,
    /// The veto is lifted too.
    Protected,
}

/// What is checked.
#[derive(Debug, Clone)]
pub struct Takeover {
    pub start: Start,
    /// How many faults may happen. Repairs are never forced, and always possible.
    pub faults: u8,
    /// A fencing device may say of a node that stands still that it is dead.
    pub zombies: bool,
    pub broken: Option<Broken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    // Faults.
    CutRing,
    CutLink,
    CutBoth,
    CutPower(Node),
    Freeze(Node),
    ReplicatorDies(Node),
    // Repairs.
    HealRing,
    HealLink,
    PowerOn(Node),
    Thaw(Node),
    // Corosync and Pacemaker.
    LoseMember(Node),
    /// The nodes form one cluster; the configuration of `.0` goes on.
    Join(Node),
    /// What `.0` wrote into the same membership reaches the peer.
    CatchUp(Node),
    RequestFencing(Node),
    Fence(Node),
    ConfirmFencing(Node),
    PromoteStore(Node),
    PromoteRun(Node),
    Demote(Node),
    // The machine and its outputs.
    Execute(Node),
    Attach(Node),
    Fenced(Node),
    // The sender.
    Connect(Node),
    BeginCopy(Node),
    Arm(Node),
    Cut(Node),
    TakeAck(Node),
    SenderLoses(Node),
    WriteVeto(Node),
    ProveVeto(Node),
    GiveUpVeto(Node),
    OpenGate(Node),
    ClearVeto(Node),
    ClearVetoDone(Node),
    OrphanClears(Node),
    // The receiver.
    Stage(Node),
    Commit(Node),
    Report(Node),
    ReceiverLoses(Node),
}

impl Takeover {
    fn is(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }

    /// The first state.
    pub fn first(&self) -> World {
        use Action::*;
        let way = [
            PromoteStore(0),
            PromoteRun(0),
            Attach(0),
            WriteVeto(0),
            ProveVeto(0),
            OpenGate(0),
            Connect(0),
            BeginCopy(0),
            Arm(0),
            Stage(1),
            Commit(1),
            TakeAck(0),
            Report(1),
            ClearVeto(0),
            ClearVetoDone(0),
        ];
        let steps = match self.start {
            Start::Boot => 0,
            Start::FirstCopy => way.len() - 2,
            Start::Protected => way.len(),
        };
        // The way that the rules lead; what a broken rule makes needless is skipped.
        way[..steps].iter().fold(World::new(self.faults), |world, action| self.after(&world, *action).unwrap_or(world))
    }

    /// Every action that may be possible in `world`.
    pub fn possible(&self, world: &World, actions: &mut Vec<Action>) {
        use Action::*;
        if world.faults > 0 {
            actions.extend([CutRing, CutLink, CutBoth]);
            for n in 0..2 {
                actions.extend([CutPower(n), Freeze(n), ReplicatorDies(n)]);
            }
        }
        actions.extend([HealRing, HealLink]);
        for n in 0..2 {
            actions.extend([
                PowerOn(n),
                Thaw(n),
                LoseMember(n),
                Join(n),
                CatchUp(n),
                RequestFencing(n),
                Fence(n),
                ConfirmFencing(n),
                PromoteStore(n),
                PromoteRun(n),
                Demote(n),
                Execute(n),
                Attach(n),
                Fenced(n),
                Connect(n),
                BeginCopy(n),
                Arm(n),
                Cut(n),
                TakeAck(n),
                SenderLoses(n),
                WriteVeto(n),
                ProveVeto(n),
                GiveUpVeto(n),
                OpenGate(n),
                ClearVeto(n),
                ClearVetoDone(n),
                OrphanClears(n),
                Stage(n),
                Commit(n),
                Report(n),
                ReceiverLoses(n),
            ]);
        }
    }

    /// What `action` makes of `world`; `None` if it is not possible there.
    pub fn after(&self, world: &World, action: Action) -> Option<World> {
        let mut next = *world;
        self.apply(&mut next, action)?;
        for n in 0..2 {
            self.release(&mut next, n);
        }
        let next = next.normalise();
        (next != *world).then_some(next)
    }

    fn apply(&self, w: &mut World, action: Action) -> Option<()> {
        use Action::*;
        match action {
            CutRing | CutLink | CutBoth | CutPower(_) | Freeze(_) | ReplicatorDies(_) => fault(w, action),
            HealRing => w.ring = true,
            HealLink => w.link = true,
            PowerOn(n) | Thaw(n) => repair(w, action, n)?,
            LoseMember(n) | Join(n) | CatchUp(n) => membership(w, action, n)?,
            RequestFencing(n) | Fence(n) | ConfirmFencing(n) => self.fencing(w, action, n)?,
            // A node that is off or stands still does nothing.
            PromoteStore(n) | PromoteRun(n) | Demote(n) if w.hosts[n].works() => self.pacemaker(w, action, n)?,
            Execute(n) | Attach(n) | Fenced(n) if w.hosts[n].works() => self.machine(w, action, n)?,
            Connect(n) | BeginCopy(n) | Arm(n) | Cut(n) | TakeAck(n) | SenderLoses(n) if w.hosts[n].works() => {
                self.sender(w, action, n)?
            }
            WriteVeto(n) | ProveVeto(n) | GiveUpVeto(n) | OpenGate(n) | ClearVeto(n) | ClearVetoDone(n)
            | OrphanClears(n)
                if w.hosts[n].works() =>
            {
                self.veto(w, action, n)?
            }
            Stage(n) | Commit(n) | Report(n) | ReceiverLoses(n) if w.hosts[n].works() => self.receiver(w, action, n)?,
            _ => return None,
        }
        Some(())
    }

    /// The guest, the gate (`vmm/src/gate.rs`) and the board (`protocol/src/board/port.rs`).
    fn machine(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        let mut vm = w.hosts[n].vm?;
        let checks = !self.is(Broken::BoardTakesAnyGeneration);
        match action {
            Action::Execute(_) if (vm.past.len as usize) < MAX_STEPS => vm.past.step(vm.generation),
            Action::Attach(_) if !vm.attached => {
                let board = &mut w.board;
                if checks && vm.generation < board.generation {
                    w.end_machine(n);
                    return Some(());
                }
                if checks && vm.generation == board.generation && vm.past.life != board.outside.life {
                    return None; // refused: this generation was another machine's
                }
                board.generation = board.generation.max(vm.generation);
                if board.outside.life != vm.past.life && board.outside.life < vm.past.life {
                    board.outside = Past::boot(vm.past.life);
                } else if !vm.past.contains(&board.outside) {
                    w.wrong = Some(Wrong::TwoPasts);
                }
                vm.attached = true;
            }
            // The board has told it so.
            Action::Fenced(_) if vm.attached && vm.generation < w.board.generation && checks => {
                w.end_machine(n);
                return Some(());
            }
            _ => return None,
        }
        w.hosts[n].vm = Some(vm);
        Some(())
    }

    /// Outputs leave as soon as the gate lets them: the sooner, the more the world knows that a takeover can contradict. Each has a
    /// number, and the board applies it if its sender's generation is current.
    fn release(&self, w: &mut World, n: Node) {
        let host = &w.hosts[n];
        let Some(vm) = host.vm.filter(|vm| host.works() && vm.attached) else { return };
        while w.wrong.is_none() {
            let outside = w.board.outside;
            let k = outside.len;
            let goes = k < vm.past.len && (vm.gate_open || k < vm.committed);
            let old = vm.generation < w.board.generation;
            if !goes || old && !self.is(Broken::BoardTakesAnyGeneration) {
                return;
            }
            if old {
                w.wrong = Some(Wrong::OldOwnerActed);
            } else if !vm.past.contains(&outside) {
                w.wrong = Some(Wrong::TwoPasts);
            }
            w.board.outside = vm.past.first(k + 1);
        }
    }
}

fn fault(w: &mut World, action: Action) {
    use Action::*;
    let before = *w;
    match action {
        CutRing => w.ring = false,
        CutLink => w.link = false,
        CutBoth => (w.ring, w.link) = (false, false),
        CutPower(n) => w.cut_power(n),
        Freeze(n) if w.hosts[n].on => w.hosts[n].frozen = true,
        ReplicatorDies(n) if w.hosts[n].works() && w.hosts[n].vm.is_some() => {
            w.end_sender(n);
            // The VMM's session ends with it.
            if let Some(vm) = &mut w.hosts[n].vm {
                vm.gate_open = false;
            }
        }
        _ => {}
    }
    if *w != before {
        w.faults -= 1;
    }
}
