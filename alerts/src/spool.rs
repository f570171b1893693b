//! The queue on disk: an alarm that was taken is not lost when the mail server is away or the node restarts.
//!
//! ```text
//!  DIR/queue/NUMBER.json   one alarm for one recipient each, oldest first; written beside its place, synced and renamed
//!      bad/                what could not be read
//!      repeats.json        what is being counted (repeat.rs)
//!      journal.jsonl       journal.rs
//!      lock                held for the moment of a change
//!      sender              held by the one process that sends
//! ```
//! Whoever raises an alarm writes into it: Pacemaker's alert agent as `hacluster`, others as root. All files belong to the
//! directory's owner, as whom the sender runs. The queue holds [`CAPACITY`] alarms; more are refused, and the journal says so.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::alarm::Alarm;
use crate::journal::{Journal, Line};
use crate::repeat::{Repeats, Verdict};
use crate::settings::{Delivery, Recipient};

/// Where it is unless something else is said.
pub const DEFAULT_DIR: &str = "/var/spool/understudy/alerts";
/// Most alarms that wait.
pub const CAPACITY: usize = 1000;
/// Longest file that is read.
const MAX_ITEM: u64 = 64 * 1024;

/// An alarm on its way to one recipient, with all that is needed to get there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// When it was raised, seconds since 1970.
    pub at: u64,
    /// What is told.
    pub alarm: Alarm,
    /// To whom.
    pub recipient: Recipient,
    /// How.
    pub delivery: Delivery,
    /// Every node of the cluster has seen this: one of them tells it.
    #[serde(default)]
    pub everywhere: bool,
    /// How often it was tried.
    #[serde(default)]
    pub tries: u32,
    /// Not before.
    #[serde(default)]
    pub next: u64,
}

impl Item {
    /// Read a file of the queue.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let item: Self = serde_json::from_slice(bytes)?;
        Ok(Self { alarm: item.alarm.bounded(), ..item })
    }
}

/// Why an alarm could not be queued.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// No directory, or no right to it.
    #[error(
        "cannot {what} {path}: {cause}. The alert queue must be a directory of the user hacluster: `install -d -o hacluster -g haclient \
         -m 0770 {dir}`"
    )]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: String,
        /// The queue.
        dir: String,
        /// What the kernel said.
        cause: io::Error,
    },
    /// Too many wait.
    #[error(
        "the alert queue {dir} is full ({CAPACITY} wait) and this alarm is only in its journal: see there why they cannot be sent \
         (`understudy-alert queue`)"
    )]
    Full {
        /// The queue.
        dir: String,
    },
}

/// The directory.
#[derive(Debug, Clone)]
pub struct Spool {
    dir: PathBuf,
    capacity: usize,
}

/// A file of a directory that belongs to somebody else belongs to him too, where we may give it away.
pub(crate) fn give(file: &File, dir: &Path) -> io::Result<()> {
    let (ours, wanted) = (file.metadata()?, fs::metadata(dir)?);
    if (ours.uid(), ours.gid()) != (wanted.uid(), wanted.gid()) && nix::unistd::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(wanted.uid()), Some(wanted.gid()))?;
    }
    Ok(())
}

impl Spool {
    /// Open it, and make what is missing in it. The directory itself is made too, by root for `hacluster`.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, SpoolError> {
        let spool = Self { dir: dir.into(), capacity: CAPACITY };
        if !spool.dir.is_dir() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o770).create(&spool.dir);
            made.map_err(|e| spool.error("create", &spool.dir, e))?;
            if nix::unistd::geteuid().is_root()
                && let Ok(Some(user)) = nix::unistd::User::from_name("hacluster")
            {
                let given = std::os::unix::fs::chown(&spool.dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()));
                given.map_err(|e| spool.error("give to hacluster", &spool.dir, e))?;
            }
        }
        for sub in ["queue", "bad"] {
            let path = spool.dir.join(sub);
            match fs::DirBuilder::new().mode(0o770).create(&path) {
                Ok(()) => {
                    let made = File::open(&path).and_then(|made| give(&made, &spool.dir));
                    made.map_err(|e| spool.error("create", &path, e))?;
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(spool.error("create", &path, e)),
            }
        }
        Ok(spool)
    }

    /// One that is full sooner.
    #[cfg(test)]
    pub(crate) fn holding(self, capacity: usize) -> Self {
        Self { capacity, ..self }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its journal.
    pub fn journal(&self) -> Journal {
        Journal::new(&self.dir)
    }

    fn error(&self, what: &'static str, path: &Path, cause: io::Error) -> SpoolError {
        SpoolError::Io { what, path: path.display().to_string(), dir: self.dir.display().to_string(), cause }
    }

    /// Append to the journal. That it cannot be written stops nothing: the alarm matters more.
    pub fn note(&self, line: &Line<'_>) {
        if let Err(e) = self.journal().append(line) {
            eprintln!("understudy-alert: cannot write the journal {}: {e}", self.journal().path().display());
        }
    }

    fn lock(&self) -> Result<Flock<File>, SpoolError> {
        let path = self.dir.join("lock");
        let locked = self.lock_file(&path).and_then(|file| {
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from_raw_os_error(e as i32))
        });
        locked.map_err(|e| self.error("lock", &path, e))
    }

    fn lock_file(&self, path: &Path) -> io::Result<File> {
        let file = OpenOptions::new().create(true).append(true).mode(0o660).open(path)?;
        give(&file, &self.dir)?;
        Ok(file)
    }

    /// Be the one who sends; `None` if somebody is.
    pub fn sender(&self) -> Result<Option<Flock<File>>, SpoolError> {
        let path = self.dir.join("sender");
        let file = self.lock_file(&path).map_err(|e| self.error("lock", &path, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(self.error("lock", &path, e.into())),
        }
    }

    /// Take an alarm for a recipient: queue it, or count it if it repeats.
    pub fn take(&self, item: Item) -> Result<Verdict, SpoolError> {
        let lock = self.lock()?;
        let mut repeats = self.repeats();
        let verdict = repeats.take(&item.recipient, &item.alarm, item.at);
        let what = match verdict {
            Verdict::Tell => {
                self.put(&item)?;
                "queued"
            }
            Verdict::Counted(_) => "counted",
        };
        // After it is queued: what is counted as told must be.
        self.keep_repeats(&repeats)?;
        drop(lock);
        self.note(&line(&item, what));
        Ok(verdict)
    }

    /// Queue what the end of a window says. Where there is no room for all of it, it waits: whoever calls this is about to make room.
    pub fn take_due(&self, now: u64, delivery: &dyn Fn(&Recipient) -> Delivery) -> Result<(), SpoolError> {
        let _lock = self.lock()?;
        let mut repeats = self.repeats();
        let due = repeats.due(now);
        if due.is_empty() || self.names()?.len() + due.len() > self.capacity {
            return Ok(());
        }
        for (recipient, alarm) in due {
            let delivery = delivery(&recipient);
            self.put(&Item { at: now, alarm, recipient, delivery, everywhere: false, tries: 0, next: 0 })?;
        }
        self.keep_repeats(&repeats)
    }

    /// When the next window ends.
    pub fn next_due(&self) -> Option<u64> {
        self.repeats().next()
    }

    fn repeats(&self) -> Repeats {
        fs::read(self.dir.join("repeats.json")).map(|bytes| Repeats::parse(&bytes)).unwrap_or_default()
    }

    fn keep_repeats(&self, repeats: &Repeats) -> Result<(), SpoolError> {
        self.write(&self.dir.join("repeats.json"), &repeats.to_bytes())
    }

    fn put(&self, item: &Item) -> Result<(), SpoolError> {
        let names = self.names()?;
        if names.len() >= self.capacity {
            let full = SpoolError::Full { dir: self.dir.display().to_string() };
            self.note(&Line { why: Some(full.to_string()), ..line(item, "lost") });
            return Err(full);
        }
        // Numbers go up under the lock, also after the clock was set back.
        let number = names.last().and_then(|name| name.strip_suffix(".json")?.parse::<u64>().ok()).unwrap_or(0);
        let name = format!("{:020}.json", item.at.saturating_mul(1000).max(number.saturating_add(1)));
        self.write(&self.dir.join("queue").join(name), &serde_json::to_vec(item).unwrap_or_default())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), SpoolError> {
        let beside = self.dir.join(format!(".{}.{}", std::process::id(), "new"));
        let written = || -> io::Result<()> {
            let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o640).open(&beside)?;
            give(&file, &self.dir)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, path)?;
            File::open(path.parent().unwrap_or(&self.dir))?.sync_all()
        };
        written().map_err(|e| self.error("write", path, e))
    }

    /// What waits, oldest first.
    pub fn names(&self) -> Result<Vec<String>, SpoolError> {
        let queue = self.dir.join("queue");
        let read = || -> io::Result<Vec<String>> {
            fs::read_dir(&queue)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        let mut names = read().map_err(|e| self.error("list", &queue, e))?;
        names.retain(|name| name.ends_with(".json"));
        names.sort();
        Ok(names)
    }

    /// One of them. What cannot be read is put aside, so that it does not stand in the way of the others.
    pub fn get(&self, name: &str) -> Option<Item> {
        let path = self.dir.join("queue").join(name);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_ITEM + 1).read_to_end(&mut bytes));
        let why = match read {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            Err(e) => e.to_string(),
            Ok(_) if bytes.len() as u64 > MAX_ITEM => format!("it is longer than {MAX_ITEM} bytes"),
            Ok(_) => match Item::parse(&bytes) {
                Ok(item) => return Some(item),
                Err(e) => e.to_string(),
            },
        };
        let aside = self.dir.join("bad").join(name);
        let moved = fs::rename(&path, &aside);
        let why = format!("{} cannot be read ({why}); it is now {}", path.display(), aside.display());
        self.note(&Line { why: Some(why), ..Line::new(crate::now(), "lost") });
        // One that cannot even be moved would be looked at for ever.
        moved.err().map(|_| fs::remove_file(&path));
        None
    }

    /// It is tried again later.
    pub fn put_back(&self, name: &str, item: &Item) -> Result<(), SpoolError> {
        self.write(&self.dir.join("queue").join(name), &serde_json::to_vec(item).unwrap_or_default())
    }

    /// It is done with.
    pub fn remove(&self, name: &str) -> Result<(), SpoolError> {
        let path = self.dir.join("queue").join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.error("remove", &path, e)),
            _ => Ok(()),
        }
    }
}

/// A line of the journal about an item.
pub fn line<'a>(item: &'a Item, what: &'static str) -> Line<'a> {
    Line {
        subject: Some(&item.alarm.subject),
        key: Some(item.alarm.key.as_str()).filter(|key| !key.is_empty()),
        recipient: Some(&item.recipient.name),
        ..Line::new(crate::now(), what)
    }
}
