//! What capturing costs on this host, measured all the time, and what follows from it: how the next cut copies its pages.
//!
//! Pure: the cut tells its measurements, [`Costs::choose`] answers. All times in nanoseconds.

use understudy_protocol::control::Strategy;

/// Moving averages of what was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// A guest's write that traps in the dirty log.
    pub fault: f64,
    /// One page copied by one thread.
    pub copy: f64,
    /// One page protected again.
    pub protect: f64,
    /// All vCPUs stopped, from the signal; also what a round to see that they left the kernel costs.
    pub kick: f64,
    /// vCPU and device state read.
    pub state: f64,
    /// A write that traps in a locked page, until the guest runs on.
    pub lock_fault: f64,
    /// One page locked and unlocked.
    pub lock: f64,
    /// Pages that the guest wrote before their copies were made, per validated cut.
    pub collisions: f64,
}

impl Default for Costs {
    /// Before anything was measured: figures of a slow host, so that nothing is tried on a wrong promise.
    fn default() -> Self {
        Self {
            fault: 4_000.0,
            copy: 600.0,
            protect: 40.0,
            kick: 80_000.0,
            state: 100_000.0,
            lock_fault: 150_000.0,
            lock: 500.0,
            collisions: 0.0,
        }
    }
}

/// Take a measurement into an average: it moves an eighth of the way, and a single outlier (a host that was busy) moves it by no more
/// than to the double.
pub fn learn(average: &mut f64, sample: f64) {
    let sample = sample.clamp(0.0, average.max(1.0) * 8.0);
    *average += (sample - *average) / 8.0;
}

/// How a cut copies the pages that are not hot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// While the guest stands still.
    Stop,
    /// Afterwards, behind locks.
    Lock,
    /// Afterwards, counting only what was not written meanwhile.
    Validate,
}

impl Way {
    /// For people; the same word as the strategy's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => Strategy::Stop.name(),
            Self::Lock => Strategy::Lock.name(),
            Self::Validate => Strategy::Validate.name(),
        }
    }
}

/// What was chosen and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The way that was taken.
    pub way: Way,
    /// The way that was chosen; another one is taken only by a host that cannot go this one.
    pub chosen: Way,
    /// Pages that it is about.
    pub pages: u64,
    /// Expected standstill for each way: stop, lock, validate.
    pub expected: [f64; 3],
    /// Whether somebody demanded it.
    pub demanded: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self { way: Way::Stop, chosen: Way::Stop, pages: 0, expected: [0.0; 3], demanded: true }
    }
}

impl Choice {
    /// For the status; `cannot_lock` is why this host cannot lock pages.
    pub fn sentence(&self, cannot_lock: Option<&str>) -> String {
        let way = self.way.name();
        if self.way != self.chosen {
            let why = cannot_lock.unwrap_or("this host cannot do it");
            return format!("{way} instead of {} for {} pages: {why}", self.chosen.name(), self.pages);
        }
        if self.demanded {
            return format!("{way}, as configured ({} pages)", self.pages);
        }
        let [stop, lock, validate] = self.expected.map(|ns| (ns / 1000.0).round());
        format!(
            "{way} for {} pages: expected standstill {stop} µs with stop, {validate} µs with validate, {lock} µs with lock",
            self.pages
        )
    }
}

impl Costs {
    /// Choose how `pages` pages are copied by `threads` threads. The figures compared are the time that the guest loses.
    pub fn choose(&self, strategy: Strategy, pages: u64, threads: usize) -> Choice {
        let n = pages as f64;
        let stop = n * self.copy / threads.max(1) as f64;
        // Collided pages are copied in a second standstill.
        let again = if self.collisions < 0.05 { 0.0 } else { self.kick + self.state };
        let validate = self.kick / 2.0 + self.collisions.min(1.0) * again + self.collisions * self.copy;
        // A locked page is taken out of the guest's mapping: touching it again costs a fault, copied or not.
        let lock = n * (self.lock + self.fault) + self.collisions * self.lock_fault;
        let expected = [stop, lock, validate];
        let (way, demanded) = match strategy {
            Strategy::Stop => (Way::Stop, true),
            Strategy::Lock => (Way::Lock, true),
            Strategy::Validate => (Way::Validate, true),
            Strategy::Auto if stop <= validate && stop <= lock => (Way::Stop, false),
            Strategy::Auto if lock < validate => (Way::Lock, false),
            Strategy::Auto => (Way::Validate, false),
        };
        Choice { way, chosen: way, pages, expected, demanded }
    }

    /// How many pages may stay writable, if all of them are copied in the pause within `budget` ns. None when a fault costs less than a
    /// copy.
    pub fn hot_limit(&self, budget: f64, threads: usize) -> u64 {
        if self.fault <= self.copy {
            return 0;
        }
        (budget * threads.max(1) as f64 / self.copy.max(1.0)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pages_are_copied_in_the_pause_and_many_afterwards() {
        let costs = Costs::default();
        assert_eq!(costs.choose(Strategy::Auto, 20, 1).way, Way::Stop);
        assert_eq!(costs.choose(Strategy::Auto, 4096, 1).way, Way::Validate);
    }

    #[test]
    fn what_an_administrator_demands_is_done() {
        let costs = Costs::default();
        for (strategy, way) in
            [(Strategy::Stop, Way::Stop), (Strategy::Lock, Way::Lock), (Strategy::Validate, Way::Validate)]
        {
            for pages in [1, 100_000] {
                let choice = costs.choose(strategy, pages, 2);
                assert_eq!((choice.way, choice.demanded), (way, true));
            }
        }
    }

    #[test]
    fn a_way_that_the_host_cannot_go_is_not_said_to_be_gone() {
        let mut choice = Costs::default().choose(Strategy::Lock, 7, 1);
        assert_eq!(choice.sentence(None), "lock, as configured (7 pages)");
        choice.way = Way::Stop;
        assert_eq!(choice.sentence(Some("no locks here")), "stop instead of lock for 7 pages: no locks here");
    }

    #[test]
    fn many_collisions_make_stopping_better_and_cheap_locks_are_taken() {
        let costs = Costs { collisions: 3000.0, ..Costs::default() };
        assert_eq!(costs.choose(Strategy::Auto, 3000, 2).way, Way::Stop);
        let costs = Costs { collisions: 20.0, lock: 1.0, fault: 10.0, lock_fault: 1000.0, ..Costs::default() };
        assert_eq!(costs.choose(Strategy::Auto, 3000, 2).way, Way::Lock);
    }

    #[test]
    fn an_average_follows_but_no_single_outlier_moves_it_far() {
        let mut average = 100.0;
        learn(&mut average, 1e9);
        assert!(average <= 200.0, "{average}");
        (0..100).for_each(|_| learn(&mut average, 50.0));
        assert!((49.0..52.0).contains(&average), "{average}");
    }

    #[test]
    fn pages_stay_writable_only_where_a_fault_costs_more_than_a_copy() {
        let cheap_faults = Costs { fault: 300.0, ..Costs::default() };
        assert_eq!(cheap_faults.hot_limit(2e6, 2), 0);
        assert_eq!(Costs::default().hot_limit(1.2e6, 2), 4000);
    }
}
