//! What happens next, and when a run is over.

use understudy_replicator::message::Message;
use understudy_replicator::sender::Event;

use super::sabotage::Sabotage;
use super::world::{Check, World};

impl World {
    fn step(&mut self, take_overs: bool) -> Check {
        match self.random.below(100) {
            0..25 => self.sender_step()?,
            25..55 => self.deliver()?,
            55..75 => {
                if let Some((conn, frame)) = self.to_sender.pop_front() {
                    let message = Message::parse(frame.kind, &frame.payload).map_err(|e| e.to_string())?;
                    let small = message.small().ok_or("the standby sent pages")?;
                    if self.listening == Some(conn) {
                        if matches!(small, Message::Flushed(_)) {
                            self.flushed();
                            if self.flushes > 0 {
                                return Ok(());
                            }
                        }
                        self.event(Event::Message(frame.generation, frame.epoch, small));
                    }
                } else if self.conn.is_none() && self.random.one_in(3) {
                    self.event(Event::PeerLost("closed".into()));
                }
            }
            75..82 => self.guest(),
            82..86 => self.hook_done(),
            86..90 => self.reported()?,
            90..94 if self.connecting => self.connect(),
            94 if !self.ghosts.is_empty() => {
                let ghost = self.ghosts.remove(0);
                let mut steps = Vec::new();
                self.receiver.lost(ghost, &mut steps);
                self.standby_steps(steps, None)?;
            }
            95 if self.troubled && self.random.one_in(8) => {
                self.say("link breaks".into());
                self.break_link();
            }
            96 if self.troubled && self.random.one_in(10) => self.crash()?,
            97 if self.troubled && self.random.one_in(30) => {
                self.say("VMM session breaks".into());
                self.detach();
                self.event(Event::VmmLost("broken".into()));
            }
            97 if take_overs && self.random.one_in(6) => self.event(Event::HandOver),
            98 if take_overs && self.random.one_in(10) => self.take_over()?,
            _ => {}
        }
        self.check()
    }

    pub fn run(seed: u64, sabotage: Sabotage, take_overs: bool) -> Result<Tally, String> {
        let mut world = Self::new(seed, sabotage);
        let fail = |world: &World, why: String| format!("seed {seed}: {why}\n{}", world.trace.join("\n"));
        for _ in 0..3000 {
            world.step(take_overs).map_err(|why| fail(&world, why))?;
        }
        world.troubled = false;
        let epochs = world.sender.facts().epochs;
        for round in 0.. {
            world.step(false).map_err(|why| fail(&world, why))?;
            // (Not the very first moment of calm: everything has to work for a while.)
            let calm = match world.taken {
                _ if world.vmm.handed_over => world.sender.finished(),
                Some(_) => world.vmm.quit,
                None => world.sender.protected() && world.sender.facts().epochs > epochs + 5,
            };
            if calm && round > 100 {
                break;
            }
            if round > 30_000 {
                let state = format!("{:?}", world.sender);
                return Err(fail(
                    &world,
                    format!("no calm after the troubles (taken: {}): {state}", world.taken.is_some()),
                ));
            }
        }
        let facts = world.sender.facts();
        Ok(Tally {
            epochs: facts.epochs,
            losses: facts.losses,
            taken: u64::from(world.taken.is_some()),
            handed_over: u64::from(world.vmm.handed_over),
        })
    }
}

/// What a run has reached.
#[derive(Default, Debug)]
pub struct Tally {
    pub epochs: u64,
    pub losses: u64,
    pub taken: u64,
    pub handed_over: u64,
}
