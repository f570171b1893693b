//! Verify against a small world: RAM that is written at any moment, a standby that gets what epochs carry.

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 1300;

/// Page contents as numbers; the "hash" of a page is its number.
struct World {
    ram: Vec<u64>,
    standby: Vec<u64>,
    dirty: Vec<bool>,
    epoch: u64,
    verify: Verify,
    job: Option<Job>,
    now: Instant,
    /// Sabotage: the dirty log forgets this page, once.
    forgets: Option<u64>,
    /// Sabotage: the sender does not leave out what epochs carried.
    counts_dirty: bool,
    outcome: Option<Outcome>,
}

impl World {
    fn new() -> Self {
        let mut verify = Verify::default();
        verify.ram_pages(PAGES);
        let ram: Vec<u64> = (0..PAGES).collect();
        let dirty = vec![false; PAGES as usize];
        let (job, now) = (None, Instant::now());
        Self {
            standby: ram.clone(),
            ram,
            dirty,
            epoch: 0,
            verify,
            job,
            now,
            forgets: None,
            counts_dirty: false,
            outcome: None,
        }
    }

    fn write(&mut self, page: u64) {
        self.ram[page as usize] += 1000;
        if self.forgets.take_if(|forgotten| *forgotten == page).is_none() {
            self.dirty[page as usize] = true;
        }
    }

    fn open(&mut self) {
        match self.verify.open(Epoch(self.epoch), self.now) {
            Some(Next::Hash(job)) => self.job = Some(job),
            Some(Next::Over(outcome)) => self.outcome = Some(outcome),
            None => {}
        }
    }

    /// Part of the chunk before `write`, the rest after.
    fn hash_around(&mut self, split: u64, write: Option<u64>) {
        let Some(job) = self.job.take() else { return };
        let split = split.min(job.count);
        let mut hashes: Vec<u64> = (0..split).map(|i| self.ram[(job.first + i) as usize]).collect();
        if let Some(page) = write {
            self.write(page);
        }
        hashes.extend((split..job.count).map(|i| self.ram[(job.first + i) as usize]));
        self.verify.hashed(job.ticket, Some(hashes));
    }

    /// Pages go early, as a precopy does: they are clean then.
    fn carry(&mut self, of: Epoch, only: impl Fn(u64) -> bool) {
        let pages: Vec<u64> = (0..PAGES).filter(|page| self.dirty[*page as usize] && only(*page)).collect();
        for page in &pages {
            self.dirty[*page as usize] = false;
            self.standby[*page as usize] = self.ram[*page as usize];
        }
        if !self.counts_dirty {
            self.verify.carried(of, page_list(&pages).as_chunks().0);
        }
    }

    /// Cut, carry, end, compare.
    fn epoch(&mut self) {
        self.epoch += 1;
        let epoch = Epoch(self.epoch);
        self.verify.cut(epoch);
        self.carry(epoch, |_| true);
        let Some(check) = self.verify.ended(epoch) else { return };
        let check = Check::parse(&check.payload()).unwrap();
        let differs = |(page, hash): &&(u64, u64)| self.standby[*page as usize] != *hash;
        let differing: Vec<u64> = check.pages().iter().filter(differs).map(|(page, _)| *page).collect();
        if let Some(outcome) = self.verify.checked(epoch, &differing, self.now) {
            self.outcome = Some(outcome);
        }
    }

    /// A guest that writes `burst` random pages at each of several moments of every epoch.
    fn run(&mut self, seed: u64, burst: u64) -> Outcome {
        let mut random = seed | 1;
        let mut page = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 16) % PAGES
        };
        self.verify.request(self.now);
        for _ in 0..10_000 {
            (0..burst).for_each(|_| self.write(page()));
            self.open();
            // Sometimes the hashing takes longer than the epoch.
            if page() % 3 > 0 {
                (0..burst).for_each(|_| self.write(page()));
                let (split, write) = (page() % CHUNK, page());
                self.hash_around(split, (burst > 0).then_some(write));
            }
            (0..burst).for_each(|_| self.write(page()));
            let half = page();
            self.carry(Epoch(self.epoch + 1), |page| page < half);
            (0..burst).for_each(|_| self.write(page()));
            self.epoch();
            if let Some(outcome) = self.outcome.take() {
                return outcome;
            }
        }
        panic!("the pass does not end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whenever_the_guest_writes_there_is_no_false_alarm(seed in any::<u64>(), burst in 0u64..400) {
        let outcome = World::new().run(seed, burst);
        let Outcome::Agreed { compared, busy, .. } = outcome else { panic!("{outcome:?}") };
        prop_assert_eq!(compared + busy, PAGES);
        prop_assert!(burst > 10 || busy == 0, "a quiet guest is compared completely: {} busy", busy);
    }

    #[test]
    fn a_page_that_is_damaged_on_the_standby_is_named(seed in any::<u64>(), page in 0..PAGES) {
        let mut world = World::new();
        world.standby[page as usize] ^= 1 << 40;
        prop_assert_eq!(world.run(seed, 0), Outcome::Differs(vec![page]));
    }
}

#[test]
fn a_write_that_the_dirty_log_forgot_is_found() {
    let mut world = World::new();
    world.forgets = Some(700);
    world.write(700);
    assert_eq!(world.run(1, 0), Outcome::Differs(vec![700]));
}

#[test]
fn without_leaving_out_what_epochs_carried_there_would_be_false_alarms() {
    let mut world = World::new();
    world.counts_dirty = true;
    assert!(matches!(world.run(1, 20), Outcome::Differs(_)));
}

#[test]
fn a_page_that_is_always_written_is_busy_and_the_pass_ends() {
    let mut world = World::new();
    world.verify.request(world.now);
    for _ in 0..200 {
        world.open();
        world.hash_around(0, Some(5));
        world.epoch();
        if let Some(outcome) = world.outcome.take() {
            let Outcome::Agreed { compared, busy, .. } = outcome else { panic!("{outcome:?}") };
            assert_eq!((compared, busy), (PAGES - 1, 1));
            let report = world.verify.report(world.now);
            assert_eq!((report.passes, report.busy_pages, report.running), (1, 1, false));
            return;
        }
    }
    panic!("the pass does not end");
}

#[test]
fn what_was_under_way_on_a_lost_connection_is_asked_again_and_a_first_copy_begins_from_the_start() {
    let mut world = World::new();
    assert_eq!(world.verify.request(world.now), 1);
    world.open();
    world.hash_around(0, None);
    world.verify.interrupted();
    // The answer to what was asked before the loss is not believed.
    assert_eq!(world.verify.checked(Epoch(1), &[3], world.now), None);
    for _ in 0..2 {
        world.open();
        world.hash_around(0, None);
        world.epoch();
    }
    assert_eq!(world.verify.report(world.now).progress_percent, 60, "788 of 1300 pages");
    world.verify.begin_again();
    assert_eq!(world.verify.report(world.now).progress_percent, 0);
    assert_eq!(world.verify.request(world.now), 1, "it is still the same pass");
    assert_eq!(world.run(1, 0), Outcome::Agreed { compared: PAGES, busy: 0, took: Duration::ZERO });
}

#[test]
fn a_cut_that_came_to_nothing_closes_no_window() {
    let mut world = World::new();
    world.verify.request(world.now);
    world.open();
    world.hash_around(0, None);
    world.verify.cut(Epoch(1));
    world.epoch = 1;
    // The VMM refused that cut; the pages of the next are not told apart from it.
    world.write(3);
    world.verify.cut(Epoch(2));
    assert_eq!(world.verify.ended(Epoch(2)), None);
    assert_eq!(world.run(1, 0), Outcome::Agreed { compared: PAGES, busy: 0, took: Duration::ZERO });
}
