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
}

impl Alarm {
    /// An alarm about nothing in particular, always told.
    pub fn new(severity: Severity, subject: impl Into<String>, text: impl Into<String>) -> Self {
        Self { severity, subject: subject.into(), text: text.into(), machine: None, node: None, key: String::new() }
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

/// Why an alarm did not go out: a sentence for the person who has to act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Trouble(pub String);

/// Something that takes alarms: a mail server, a command, the queue on disk.
pub trait Sink {
    /// Tell. When it returns without an error the other side has taken the alarm.
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble>;
}
