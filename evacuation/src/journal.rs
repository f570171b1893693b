//! The journal on disk: every event once, one line of JSON each, only ever appended to.
//!
//! Events are made in the cluster, in the same change as what they tell of; the newest [`KEPT_EVENTS`] are there. The controller of the hour
//! copies them to its own node's file, and goes on where that file ends: a node that was not the controller for a while has a gap, and a
//! line that says so, if more happened meanwhile than the cluster keeps.
//!
//! [`KEPT_EVENTS`]: understudy_crm::records::KEPT_EVENTS

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use understudy_crm::records::Event;

/// As much of the end of the file is read to find its last event. A line is shorter.
const TAIL: u64 = 1 << 16;

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    last: Option<u64>,
}

impl Journal {
    /// Open, make if it is not there; a last line that a crash left unfinished is ended.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new().append(true).read(true).create(true).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut tail = Vec::new();
        BufReader::new(&file).take(TAIL).read_to_end(&mut tail)?;
        if tail.last().is_some_and(|last| *last != b'\n') {
            file.write_all(b"\n")?;
        }
        Ok(Self { file, path: path.to_owned(), last: last_number(&tail) })
    }

    /// Append those that are not there. They go to the system log as well.
    pub fn append(&mut self, events: &[Event]) -> io::Result<()> {
        let last = self.last.unwrap_or(0);
        // A cluster that was made anew counts from one again.
        let begun_anew = events.last().is_some_and(|e| e.number < last);
        let new = events.iter().filter(|e| begun_anew || e.number > last);
        let mut expected = (self.last.is_some() && !begun_anew).then_some(last + 1);
        let mut text = String::new();
        for event in new {
            if expected.is_some_and(|number| number != event.number) {
                text.push_str(&format!(
                    "{{\"gap\":\"events {} to {} are in the journal of another node\"}}\n",
                    last + 1,
                    event.number - 1
                ));
            }
            expected = None;
            text.push_str(&serde_json::to_string(event)?);
            text.push('\n');
            to_syslog(event);
            self.last = Some(event.number);
        }
        if !text.is_empty() {
            self.file.write_all(text.as_bytes())?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The number of the last event in these lines; what is no event is skipped.
pub fn last_number(lines: &[u8]) -> Option<u64> {
    let lines: Vec<_> = BufReader::new(lines).split(b'\n').map_while(Result::ok).collect();
    lines.iter().rev().find_map(|line| serde_json::from_slice::<Event>(line).ok()).map(|e| e.number)
}

fn to_syslog(event: &Event) {
    // daemon.warning for alarms, daemon.notice for the rest. Without a system log there is the file.
    let priority = if event.kind == "alarm" { 3 * 8 + 4 } else { 3 * 8 + 5 };
    let line = format!("<{priority}>understudy-evacuator: {event}");
    let _ = UnixDatagram::unbound().and_then(|s| s.send_to(line.as_bytes(), "/dev/log"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(numbers: std::ops::Range<u64>) -> Vec<Event> {
        let event = |number| Event {
            number,
            at: 0,
            node: "n1".into(),
            kind: "plan".into(),
            plan: None,
            machine: None,
            text: format!("event {number}"),
        };
        numbers.map(event).collect()
    }

    fn numbers(path: &Path) -> Vec<u64> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|l| serde_json::from_str::<Event>(l).map_or(0, |e| e.number)).collect()
    }

    #[test]
    fn every_event_is_written_once_whoever_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log/journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&events(1..4)).unwrap();
        journal.append(&events(1..6)).unwrap();
        drop(journal);
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&events(2..8)).unwrap();
        assert_eq!(numbers(&path), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_gap_and_a_torn_line_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        Journal::open(&path).unwrap().append(&events(1..3)).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"number\":3,\"at\"").unwrap();
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&events(9..11)).unwrap();
        assert_eq!(numbers(&path), [1, 2, 0, 0, 9, 10]);
        assert!(fs::read_to_string(&path).unwrap().contains("events 3 to 8 are in the journal of another node"));
    }

    #[test]
    fn a_cluster_that_begins_anew_is_written_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&events(50..53)).unwrap();
        journal.append(&events(1..3)).unwrap();
        journal.append(&events(1..4)).unwrap();
        assert_eq!(numbers(&path), [50, 51, 52, 1, 2, 3]);
    }
}
