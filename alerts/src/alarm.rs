//! An alarm: one thing that somebody should know.

use serde::{Deserialize, Serialize};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know: a node came back.
    Info,
    /// Something works less well than it should.
    Warning,
    /// Something does not work, or somebody is asked.
    Critical,
}

impl Severity {
    /// As the policy file and the journal have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// What a recipient is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// How bad it is.
    pub severity: Severity,
    /// One line, for a subject or a short message.
    pub subject: String,
    /// The whole of it: sentences for the person who has to act.
    #[serde(default)]
    pub text: String,
    /// The machine that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The node that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What makes two alarms the same: alarms with this key that follow each other closely are told once and counted. An alarm
    /// with an empty key is always told.
    #[serde(default)]
    pub key: String,
    /// What a short message says, where the subject is not enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short: Option<String>,
}

/// Longest text of an alarm that is delivered, in bytes.
pub const MAX_TEXT: usize = 16 * 1024;
/// Longest subject.
pub const MAX_SUBJECT: usize = 200;

impl Alarm {
    /// What a short message says.
    pub fn in_short(&self) -> &str {
        self.short.as_deref().unwrap_or(&self.subject)
    }

    /// As a reader of records from elsewhere must have it: nothing is longer than [`Alarm::new`] makes it.
    pub fn bounded(self) -> Self {
        let Self { severity, subject, text, machine, node, key, short } = self;
        let line = |text: Option<String>| text.map(|text| one_line(&text));
        let (subject, text, key) = (one_line(&subject), cut(text, MAX_TEXT), one_line(&key));
        Self { severity, subject, text, machine: line(machine), node: line(node), key, short: line(short) }
    }

    /// An alarm about nothing in particular, always told.
    pub fn new(severity: Severity, subject: impl Into<String>, text: impl Into<String>) -> Self {
        let (subject, text) = (one_line(&subject.into()), cut(text.into(), MAX_TEXT));
        Self { severity, subject, text, machine: None, node: None, key: String::new(), short: None }
    }

    /// About this machine.
    pub fn machine(self, name: impl Into<String>) -> Self {
        Self { machine: Some(name.into()), ..self }
    }

    /// About this node.
    pub fn node(self, name: impl Into<String>) -> Self {
        Self { node: Some(name.into()), ..self }
    }

    /// The same as others with this key.
    pub fn key(self, key: impl Into<String>) -> Self {
        Self { key: key.into(), ..self }
    }
}

/// At most so many bytes, cut between characters; what was cut is marked.
pub fn cut(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let mut end = bytes.saturating_sub('…'.len_utf8());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Without line ends and other control characters: what stands in a mail's header, or in a line of the journal.
fn one_line(text: &str) -> String {
    cut(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(), MAX_SUBJECT)
}

/// Why an alarm did not go out: a sentence for the person who has to act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Trouble {
    /// The sentence.
    pub text: String,
    /// Whether it is this alarm that is not wanted (a mail server that knows no such address), rather than the way to the
    /// recipient that is closed. Others for the same recipient need not wait then.
    pub lasting: bool,
}

impl Trouble {
    /// It may work later.
    pub fn passing(text: impl Into<String>) -> Self {
        Self { text: text.into(), lasting: false }
    }

    /// It will hardly work later, for this alarm.
    pub fn lasting(text: impl Into<String>) -> Self {
        Self { text: text.into(), lasting: true }
    }
}

/// Something that takes alarms: a mail server, a command, the queue on disk.
pub trait Sink {
    /// Tell. When it returns without an error the other side has taken the alarm.
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble>;
}
