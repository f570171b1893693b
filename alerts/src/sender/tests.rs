use std::cell::{Cell, RefCell};

use super::*;
use crate::alarm::{Alarm, Severity, Trouble};
use crate::settings::Kind;
use crate::spool::CAPACITY;

/// What goes wrong with an item at a time.
type Wrong = Box<dyn Fn(u64, &Item) -> Option<Trouble>>;

/// A world whose clock moves when somebody waits.
struct Simulated {
    now: Cell<u64>,
    turn: Cell<Turn>,
    told: RefCell<Vec<(u64, String, String)>>,
    trouble: RefCell<Wrong>,
}

impl Simulated {
    fn new() -> Self {
        let trouble: Wrong = Box::new(|_, _| None);
        Self { now: Cell::new(1000), turn: Cell::new(Turn::Ours), told: RefCell::default(), trouble: trouble.into() }
    }

    fn told(&self) -> Vec<(String, String)> {
        self.told.borrow().iter().map(|(_, name, subject)| (name.clone(), subject.clone())).collect()
    }
}

impl World for Simulated {
    fn now(&self) -> u64 {
        self.now.get()
    }
    fn pause(&self, at_most: Duration) {
        self.now.set(self.now.get() + at_most.as_secs().max(1));
    }
    fn turn(&self) -> Turn {
        self.turn.get()
    }
    fn current(&self, _: &Recipient) -> Option<(Recipient, Delivery)> {
        None
    }
    fn tell(&self, item: &Item) -> Result<(), Trouble> {
        if let Some(trouble) = (self.trouble.borrow())(self.now(), item) {
            return Err(trouble);
        }
        self.told.borrow_mut().push((self.now(), item.recipient.name.clone(), item.alarm.subject.clone()));
        Ok(())
    }
}

fn item(name: &str, subject: &str, key: &str, at: u64) -> Item {
    let recipient = Recipient {
        name: name.into(),
        kind: Kind::Mail,
        to: "a@b".into(),
        approves: false,
        severity: Severity::Info,
        window: 300,
    };
    let alarm = Alarm::new(Severity::Warning, subject, "").key(key);
    Item { at, alarm, recipient, delivery: Delivery::default(), everywhere: false, tries: 0, next: 0 }
}

fn spool() -> (tempfile::TempDir, Spool) {
    // Three days of retries are two thousand syncs: in memory where there is a tmpfs.
    let shm = std::path::Path::new("/dev/shm");
    let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
    let spool = Spool::open(dir.path().join("alerts")).unwrap();
    (dir, spool)
}

fn journal(spool: &Spool) -> Vec<String> {
    let text = std::fs::read_to_string(spool.journal().path()).unwrap();
    text.lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["what"].as_str().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn what_was_queued_is_told_in_order_and_written_down() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    for subject in ["one", "two", "three"] {
        spool.take(item("a", subject, "", 1000)).unwrap();
    }
    run(&spool, &world).unwrap();
    let subjects: Vec<_> = world.told().into_iter().map(|(_, subject)| subject).collect();
    assert_eq!(subjects, ["one", "two", "three"]);
    assert_eq!(spool.names().unwrap(), [""; 0]);
    assert_eq!(journal(&spool), ["queued", "queued", "queued", "told", "told", "told"]);
}

#[test]
fn a_server_that_is_away_delays_and_loses_nothing_and_holds_up_nobody_else() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    // Away for an hour; the pauses grow to ten minutes.
    *world.trouble.borrow_mut() = Box::new(|now, item| {
        (item.recipient.name == "a" && now < 1000 + 3600).then(|| Trouble::passing("the mail server is away"))
    });
    for subject in ["one", "two"] {
        spool.take(item("a", subject, "", 1000)).unwrap();
    }
    spool.take(item("b", "three", "", 1000)).unwrap();
    run(&spool, &world).unwrap();
    let told = world.told.borrow();
    assert_eq!((told[0].0, told[0].1.as_str()), (1000, "b"));
    assert_eq!((told[1].2.as_str(), told[2].2.as_str()), ("one", "two"));
    assert!(told[1].0 < 1000 + 3600 + 600, "{told:?}");
    let failed = journal(&spool).iter().filter(|what| *what == "failed").count();
    // One a pause, not one an alarm: 5 + 10 + … + 600 + 600 …
    assert!((8..=14).contains(&failed), "{failed}");
}

#[test]
fn an_alarm_that_a_server_will_not_have_does_not_hold_up_the_others() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    *world.trouble.borrow_mut() =
        Box::new(|_, item| (item.alarm.subject == "bad").then(|| Trouble::lasting("no such user")));
    spool.take(item("a", "bad", "", 1000)).unwrap();
    spool.take(item("a", "good", "", 1000)).unwrap();
    run(&spool, &world).unwrap();
    assert_eq!((world.told.borrow()[0].0, world.told.borrow()[0].2.as_str()), (1000, "good"));
    // It is given up after three days, and that is written down.
    assert_eq!(journal(&spool).last().unwrap(), "gave-up");
    assert!(world.now() >= 1000 + GIVE_UP);
}

#[test]
fn what_repeats_is_told_once_and_then_with_its_number() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    for _ in 0..7 {
        spool.take(item("a", "n1 is lost", "node n1 lost", 1000)).unwrap();
    }
    run(&spool, &world).unwrap();
    let told = world.told.borrow();
    assert_eq!(told[0], (1000, "a".into(), "n1 is lost".into()));
    assert_eq!(told[1], (1300, "a".into(), "n1 is lost (and 6 more)".into()));
    assert_eq!(told.len(), 2);
}

#[test]
fn what_every_node_knows_one_of_them_tells() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    world.turn.set(Turn::Anothers);
    spool.take(Item { everywhere: true, ..item("a", "n1 is lost", "", 1000) }).unwrap();
    run(&spool, &world).unwrap();
    assert_eq!((world.told(), journal(&spool).last().unwrap().as_str()), (vec![], "left"));
    assert!(world.now() >= 1000 + STAND_BY);
}

#[test]
fn if_that_one_dies_too_the_next_one_tells_it() {
    let (_dir, spool) = spool();
    let world = Simulated::new();
    world.turn.set(Turn::Anothers);
    spool.take(Item { everywhere: true, ..item("a", "n1 is lost", "", 1000) }).unwrap();
    let mut held = HashMap::new();
    assert_eq!(round(&spool, &world, &mut held).unwrap(), Some(1010));
    world.now.set(1010);
    world.turn.set(Turn::Ours);
    assert_eq!(round(&spool, &world, &mut held).unwrap(), None);
    assert_eq!(world.told().len(), 1);
}

#[test]
fn a_full_queue_says_so_and_writes_it_down() {
    let (_dir, spool) = spool();
    for n in 0..CAPACITY {
        std::fs::write(spool.dir().join(format!("queue/{n:020}.json")), "").unwrap();
    }
    let error = spool.take(item("a", "one more", "", 1000)).unwrap_err().to_string();
    assert!(error.contains("is full (1000 wait)"), "{error}");
    assert_eq!(journal(&spool), ["lost"]);
}

#[test]
fn a_full_queue_is_emptied_also_when_a_window_ends_meanwhile() {
    let (_dir, spool) = spool();
    let spool = spool.holding(5);
    let world = Simulated::new();
    for subject in ["one", "two", "three", "four", "five"] {
        spool.take(item("a", subject, "", 1000)).unwrap();
    }
    assert!(spool.take(item("a", "six", "", 1000)).is_err());
    // Told before; what repeated since has ended its window, and its number finds no room.
    let mut repeats = crate::repeat::Repeats::default();
    let repeated = item("a", "again", "k", 500);
    repeats.take(&repeated.recipient, &repeated.alarm, 500);
    repeats.take(&repeated.recipient, &repeated.alarm, 501);
    std::fs::write(spool.dir().join("repeats.json"), repeats.to_bytes()).unwrap();
    run(&spool, &world).unwrap();
    let subjects: Vec<_> = world.told().into_iter().map(|(_, subject)| subject).collect();
    assert_eq!(subjects, ["one", "two", "three", "four", "five", "again (and 1 more)"]);
}

#[test]
fn a_file_that_cannot_be_read_is_put_aside() {
    let (_dir, spool) = spool();
    std::fs::write(spool.dir().join("queue/00000000000000000001.json"), "{").unwrap();
    std::fs::write(spool.dir().join("queue/00000000000000000002.json"), vec![b' '; 100_000]).unwrap();
    let world = Simulated::new();
    spool.take(item("a", "good", "", 1000)).unwrap();
    run(&spool, &world).unwrap();
    assert_eq!(world.told().len(), 1);
    assert_eq!(std::fs::read_dir(spool.dir().join("bad")).unwrap().count(), 2);
}

#[test]
fn there_is_one_sender() {
    let (_dir, spool) = spool();
    let lock = spool.sender().unwrap().unwrap();
    spool.take(item("a", "one", "", 1000)).unwrap();
    let world = Simulated::new();
    run(&spool, &world).unwrap();
    assert_eq!(world.told(), []);
    drop(lock);
    run(&spool, &world).unwrap();
    assert_eq!(world.told().len(), 1);
}

#[test]
fn a_clock_that_is_set_back_holds_up_nothing() {
    let (_dir, spool) = spool();
    spool.take(Item { next: 1_000_000, ..item("a", "one", "", 999_990) }).unwrap();
    let world = Simulated::new();
    run(&spool, &world).unwrap();
    assert_eq!(world.told.borrow()[0].0, 1000);
}

#[test]
fn pauses_grow_to_ten_minutes() {
    let pauses: Vec<u64> = (1..=9).map(pause).collect();
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 320, 600, 600]);
    assert_eq!((pause(0), pause(u32::MAX)), (5, 600));
}
