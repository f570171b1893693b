//! Alarms that repeat: told once, counted for a while, then told once more with their number. Pure: time comes in.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::alarm::Alarm;
use crate::settings::Recipient;

/// So many kinds of alarms are counted at once; beyond that every alarm is told.
const MOST: usize = 500;

/// What is being counted, by recipient and key.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Repeats {
    open: BTreeMap<String, Open>,
}

/// A window in which the same alarm is counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Open {
    /// Until when.
    until: u64,
    /// How many were not told.
    more: u32,
    /// To whom.
    recipient: Recipient,
    /// The newest of them.
    last: Alarm,
}

/// What becomes of an alarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is told.
    Tell,
    /// It is the same as one that was told; so many were not told by now.
    Counted(u32),
}

impl Repeats {
    /// Read what was written; anything else counts as nothing (an alarm more is told).
    pub fn parse(bytes: &[u8]) -> Self {
        let read: Self = serde_json::from_slice(bytes).unwrap_or_default();
        let bounded = |mut open: Open| {
            open.last = open.last.bounded();
            open
        };
        Self { open: read.open.into_iter().take(MOST).map(|(k, open)| (k, bounded(open))).collect() }
    }

    /// As bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// An alarm for a recipient, now.
    pub fn take(&mut self, recipient: &Recipient, alarm: &Alarm, now: u64) -> Verdict {
        if alarm.key.is_empty() || recipient.window == 0 {
            return Verdict::Tell;
        }
        let id = format!("{}\n{}", recipient.name, alarm.key);
        if let Some(open) = self.open.get_mut(&id) {
            // A clock that was set back does not keep a window open for ever.
            if now < open.until && open.until - now <= recipient.window {
                open.more = open.more.saturating_add(1);
                open.last = alarm.clone();
                return Verdict::Counted(open.more);
            }
            // What `due` has not fetched yet is told with this one; the window begins anew.
            let more = open.more;
            *open = opened(recipient, alarm, now, more);
            return Verdict::Tell;
        }
        self.open.retain(|_, open| open.more > 0 || now < open.until);
        if self.open.len() < MOST {
            let open = opened(recipient, alarm, now, 0);
            self.open.insert(id, open);
        }
        Verdict::Tell
    }

    /// Windows that have ended with something untold: an alarm that says how many.
    pub fn due(&mut self, now: u64) -> Vec<(Recipient, Alarm)> {
        let mut due = Vec::new();
        self.open.retain(|_, open| {
            let ended = now >= open.until || open.until - now > open.recipient.window;
            if ended && open.more > 0 {
                let Open { more, last, recipient, .. } = open;
                let times = if *more == 1 { "once more".to_owned() } else { format!("{more} more times") };
                let text = format!(
                    "This happened {times} within {} s of the alarm before. The last of them:\n\n{}",
                    recipient.window, last.text
                );
                let alarm = Alarm { text, ..last.clone() };
                let subject = format!("{} (and {more} more)", last.subject);
                // Told whatever else happens: it has no key.
                due.push((recipient.clone(), Alarm { subject, key: String::new(), ..alarm }.bounded()));
            }
            !ended
        });
        due
    }

    /// When the next window ends with something untold.
    pub fn next(&self) -> Option<u64> {
        self.open.values().filter(|open| open.more > 0).map(|open| open.until).min()
    }
}

/// A window that begins now.
fn opened(recipient: &Recipient, alarm: &Alarm, now: u64, more: u32) -> Open {
    let until = now.saturating_add(recipient.window);
    Open { until, more, recipient: recipient.clone(), last: alarm.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alarm::Severity;
    use crate::settings::Kind;
    use proptest::prelude::*;

    fn to(name: &str) -> Recipient {
        Recipient {
            name: name.into(),
            kind: Kind::Mail,
            to: "a@b".into(),
            approves: false,
            severity: Severity::Info,
            window: 300,
        }
    }

    fn alarm(key: &str) -> Alarm {
        Alarm::new(Severity::Warning, "n1 is lost", "text").key(key)
    }

    #[test]
    fn the_same_alarm_is_told_once_and_then_once_with_its_number() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 1000), Verdict::Tell);
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 1001), Verdict::Counted(1));
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 1299), Verdict::Counted(2));
        assert_eq!(repeats.next(), Some(1300));
        assert_eq!(repeats.due(1299), []);
        let due = repeats.due(1300);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0].1.subject, "n1 is lost (and 2 more)");
        assert!(due[0].1.text.contains("2 more times within 300 s"), "{}", due[0].1.text);
        assert_eq!((repeats.due(1300), repeats.next()), (vec![], None));
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 1301), Verdict::Tell);
    }

    #[test]
    fn other_recipients_other_keys_and_no_key_are_told_each() {
        let mut repeats = Repeats::default();
        for (name, key) in [("a", "k"), ("b", "k"), ("a", "l"), ("a", ""), ("a", "")] {
            assert_eq!(repeats.take(&to(name), &alarm(key), 1000), Verdict::Tell, "{name} {key}");
        }
        let each = Recipient { window: 0, ..to("c") };
        assert_eq!(repeats.take(&each, &alarm("k"), 1000), Verdict::Tell);
        assert_eq!(repeats.take(&each, &alarm("k"), 1000), Verdict::Tell);
    }

    #[test]
    fn a_window_that_nobody_ended_is_told_with_the_next() {
        let mut repeats = Repeats::default();
        repeats.take(&to("a"), &alarm("k"), 1000);
        repeats.take(&to("a"), &alarm("k"), 1100);
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 2000), Verdict::Tell);
        assert_eq!(repeats.due(2300)[0].1.subject, "n1 is lost (and 1 more)");
    }

    #[test]
    fn a_clock_that_is_set_back_ends_windows() {
        let mut repeats = Repeats::default();
        repeats.take(&to("a"), &alarm("k"), 1_000_000);
        repeats.take(&to("a"), &alarm("k"), 1_000_001);
        assert_eq!(repeats.take(&to("a"), &alarm("k"), 5), Verdict::Tell);
    }

    proptest! {
        /// Nothing is lost: what was not told is in some "and N more".
        #[test]
        fn told_and_counted_make_all(steps in proptest::collection::vec((0..400u64, 0..3u8), 1..60)) {
            let (mut repeats, mut now, mut told, mut more) = (Repeats::default(), 0, 0u32, 0u32);
            let count = |due: Vec<(Recipient, Alarm)>| -> u32 {
                due.iter().map(|(_, alarm)| {
                    let words = alarm.subject.rsplit("(and ").next().unwrap();
                    words.split(' ').next().unwrap().parse::<u32>().unwrap()
                }).sum()
            };
            for (later, key) in &steps {
                now += later;
                told += u32::from(repeats.take(&to("a"), &alarm(&key.to_string()), now) == Verdict::Tell);
                if later % 3 == 0 { more += count(repeats.due(now)); }
                repeats = Repeats::parse(&repeats.to_bytes());
            }
            more += count(repeats.due(now + 300));
            prop_assert_eq!(told + more, steps.len() as u32);
        }
    }
}
