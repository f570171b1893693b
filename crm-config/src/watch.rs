//! `understudy-crm watch`: the controller's journal, while it is written.
//!
//! The newest events stand in the cluster, so that every node can show them, also while the controller moves from one to another.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::live;
use crate::records::{self, Event};

/// How often the cluster is asked.
const EVERY: Duration = Duration::from_secs(1);

/// Print the cluster's events, and with `once` nothing after that. Ends when nobody reads any more.
pub fn cluster(json: bool, once: bool) -> Result<()> {
    let mut last = None;
    loop {
        let state = records::read(&live::query()?)?.state;
        let (lines, next) = new_lines(&state.events, last, json);
        last = next.or(last);
        let mut out = std::io::stdout().lock();
        for line in lines {
            if writeln!(out, "{line}").is_err() {
                return Ok(());
            }
        }
        out.flush().context("printing")?;
        drop(out);
        if once {
            return Ok(());
        }
        std::thread::sleep(EVERY);
    }
}

/// What has not been shown, and the number of the last.
fn new_lines(events: &[Event], last: Option<u64>, json: bool) -> (Vec<String>, Option<u64>) {
    let newest = events.last().map(|e| e.number);
    // A cluster whose records were removed counts from one again.
    let last = last.filter(|last| newest.is_some_and(|newest| newest >= *last));
    let mut lines = Vec::new();
    let mut expected = last.map(|l| l + 1);
    for event in events.iter().filter(|e| last.is_none_or(|l| e.number > l)) {
        if expected.is_some_and(|number| number < event.number) && !json {
            lines.push("   ... more happened than the cluster keeps: see the journals of its nodes".into());
        }
        expected = None;
        lines.push(line(event, json));
    }
    (lines, newest)
}

fn line(event: &Event, json: bool) -> String {
    if json { serde_json::to_string(event).unwrap_or_default() } else { event.to_string() }
}

/// Print a journal's file. What is no event is printed as it stands.
pub fn file(text: &str, json: bool) {
    for raw in text.lines() {
        match serde_json::from_str::<Event>(raw) {
            Ok(event) => println!("{}", line(&event, json)),
            Err(_) => println!("{raw}"),
        }
    }
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
            plan: Some("p1".into()),
            machine: None,
            text: "text".into(),
        };
        numbers.map(event).collect()
    }

    #[test]
    fn every_event_is_shown_once_and_a_gap_is_said() {
        let (lines, last) = new_lines(&events(1..4), None, false);
        assert_eq!((lines.len(), last), (3, Some(3)));
        assert!(lines[0].contains("1970-01-01T00:00:00Z plan     p1    text"), "{}", lines[0]);
        assert_eq!(new_lines(&events(1..4), last, true), (vec![], Some(3)));
        let (lines, last) = new_lines(&events(6..8), last, false);
        assert!(lines.len() == 3 && lines[0].contains("more happened"), "{lines:?}");
        assert_eq!(last, Some(7));
        // Begun anew.
        assert_eq!(new_lines(&events(1..3), last, true).0.len(), 2);
    }
}
