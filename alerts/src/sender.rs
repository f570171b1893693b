//! The one process of a node that empties the queue.
//!
//! Whoever queues something starts it; it ends when nothing waits. While a recipient cannot be reached it tries again, with pauses
//! that grow from 5 s to 10 min; after three days an alarm is given up, and the journal says so.

use std::collections::HashMap;
use std::time::Duration;

use crate::journal::Line;
use crate::settings::{Delivery, Recipient};
use crate::spool::{Item, Spool, SpoolError, line};

/// When an alarm that nobody took is given up, seconds.
pub const GIVE_UP: u64 = 3 * 86_400;
/// How long an alarm that every node has is kept by those whose turn it is not, seconds: as long as it may take to see that the one
/// whose turn it was has died too.
pub const STAND_BY: u64 = 120;

/// Seconds until the next try, after so many.
pub fn pause(tries: u32) -> u64 {
    (5u64 << tries.saturating_sub(1).min(10)).min(600)
}

/// Whose turn it is to tell what every node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Ours.
    Ours,
    /// Another node's, while it lives.
    Anothers,
}

/// The world, as far as the sender needs it.
pub trait World {
    /// Seconds since 1970.
    fn now(&self) -> u64;
    /// Pause at most so long: nothing is due before, but somebody may queue something.
    fn pause(&self, at_most: Duration);
    /// Whose turn it is.
    fn turn(&self) -> Turn;
    /// What the cluster's configuration says of this recipient by now; `None` if it cannot be asked, or knows none of that name.
    fn current(&self, recipient: &Recipient) -> Option<(Recipient, Delivery)>;
    /// Tell it.
    fn tell(&self, item: &Item) -> Result<(), crate::alarm::Trouble>;
}

/// Empty the queue; back when nothing waits, or when another process does it.
pub fn run(spool: &Spool, world: &dyn World) -> Result<(), SpoolError> {
    loop {
        let Some(lock) = spool.sender()? else { return Ok(()) };
        let mut held = HashMap::new();
        while let Some(wake) = round(spool, world, &mut held)? {
            world.pause(Duration::from_secs(wake.saturating_sub(world.now()).max(1)));
        }
        drop(lock);
        // Queued after the last look, by somebody who saw the lock held.
        if spool.names()?.is_empty() && spool.next_due().is_none() {
            return Ok(());
        }
    }
}

/// Recipients that could not be reached: how often, and not before.
type Held = HashMap<String, (u32, u64)>;

/// Everything that is due, once. When there will be more; `None` if nothing waits.
fn round(spool: &Spool, world: &dyn World, held: &mut Held) -> Result<Option<u64>, SpoolError> {
    spool.take_due(world.now(), &|recipient| world.current(recipient).map(|(_, d)| d).unwrap_or_default())?;
    let mut wake = spool.next_due();
    let mut later = |at: u64| wake = Some(wake.map_or(at, |w| w.min(at)));
    for name in spool.names()? {
        let Some(mut item) = spool.get(&name) else { continue };
        let now = world.now();
        let closed = held.get(&item.recipient.name).map_or(0, |(_, until)| *until);
        // Not longer than any pause is: a clock that was set back.
        let due = item.next.max(closed);
        if now < due && due - now <= pause(u32::MAX) {
            later(due);
            continue;
        }
        if item.everywhere && world.turn() == Turn::Anothers {
            if now.saturating_sub(item.at) < STAND_BY {
                item.next = now + 10;
                later(item.next);
                spool.put_back(&name, &item)?;
            } else {
                spool.note(&Line { why: Some("another node tells it".into()), ..line(&item, "left") });
                spool.remove(&name)?;
            }
            continue;
        }
        if let Some((recipient, delivery)) = world.current(&item.recipient) {
            (item.recipient, item.delivery) = (recipient, delivery);
        }
        match world.tell(&item) {
            Ok(()) => {
                held.remove(&item.recipient.name);
                spool.note(&line(&item, "told"));
                spool.remove(&name)?;
            }
            Err(trouble) => {
                let now = world.now();
                item.tries = item.tries.saturating_add(1);
                let why = trouble.to_string();
                if now.saturating_sub(item.at) >= GIVE_UP {
                    spool.note(&Line { why: Some(why), ..line(&item, "gave-up") });
                    spool.remove(&name)?;
                    continue;
                }
                spool.note(&Line { why: Some(why), ..line(&item, "failed") });
                if trouble.lasting {
                    item.next = now + pause(item.tries);
                } else {
                    // The others for this recipient would fare no better.
                    let (tries, until) = held.entry(item.recipient.name.clone()).or_insert((0, 0));
                    *tries = tries.saturating_add(1);
                    *until = now + pause(*tries);
                    item.next = *until;
                }
                later(item.next);
                spool.put_back(&name, &item)?;
            }
        }
    }
    Ok(wake)
}

#[cfg(test)]
mod tests;
