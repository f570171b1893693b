//! A machine's watchdog: how it is written in configuration, and how it stands in [`crate::control::VmmStatus`].
//!
//! A guest that has armed it has to feed it. One that does not is found to hang.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which watchdog the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogModel {
    /// Intel 6300ESB, a PCI device.
    I6300esb,
}

impl WatchdogModel {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::I6300esb];

    /// Its name, as in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::I6300esb => "i6300esb",
        }
    }
}

/// What the VMM does when the guest has not fed its watchdog in time. The status says it in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// Nothing more.
    Report,
    /// The machine is reset where it is, as by its reset button.
    #[default]
    Reset,
    /// The machine is switched off.
    Off,
}

impl WatchdogAction {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Report, Self::Reset, Self::Off];

    /// Its name, as in configuration and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Reset => "reset",
            Self::Off => "off",
        }
    }
}

impl FromStr for WatchdogModel {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|model| model.name() == name);
        found.ok_or_else(|| format!("there is no watchdog {name:?}: there is i6300esb"))
    }
}

impl FromStr for WatchdogAction {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|action| action.name() == name);
        found.ok_or_else(|| format!("a watchdog cannot {name:?}: choose report, reset or off"))
    }
}

impl fmt::Display for WatchdogModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for WatchdogAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A machine's watchdog, as it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchdogSpec {
    /// What the guest sees. The same on every node.
    pub model: WatchdogModel,
    /// What follows when it expires.
    pub action: WatchdogAction,
}

/// Whether the guest feeds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogState {
    /// The guest has not armed it, or has disarmed it: nothing is known of the guest.
    NotArmed,
    /// Armed, and fed in time.
    Fed,
    /// It was not fed in time, and since then the guest has neither fed, armed nor disarmed it nor taken notice (which a driver does when it is
    /// loaded after the reset).
    Expired,
}

/// A watchdog in [`crate::control::VmmStatus`]. All times are the guest's: they stand still while it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogStatus {
    /// What the guest sees.
    pub model: WatchdogModel,
    /// What follows when it expires.
    pub action: WatchdogAction,
    /// Whether the guest feeds it.
    pub state: WatchdogState,
    /// Time in which the guest has to feed it, ms; while it is armed.
    pub timeout_ms: Option<u64>,
    /// Time since it was fed last, ms; while it is armed.
    pub fed_ms_ago: Option<u64>,
    /// Time since it expired, ms; while it is so.
    pub expired_ms_ago: Option<u64>,
    /// How often it has expired since the machine was switched on.
    pub expirations: u64,
}

impl WatchdogStatus {
    /// The guest hangs now: it has armed it, and does not feed it. (After a reset it is not armed, and what the guest does is not known.)
    pub fn hangs(&self) -> bool {
        self.state == WatchdogState::Expired && self.timeout_ms.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_others_are_refused() {
        for model in WatchdogModel::ALL {
            assert_eq!(model.to_string().parse(), Ok(model));
            assert_eq!(serde_json::to_value(model).unwrap(), model.name());
        }
        for action in WatchdogAction::ALL {
            assert_eq!(action.to_string().parse(), Ok(action));
            assert_eq!(serde_json::to_value(action).unwrap(), action.name());
        }
        assert!("ib700".parse::<WatchdogModel>().unwrap_err().contains("i6300esb"));
        assert!("panic".parse::<WatchdogAction>().unwrap_err().contains("report, reset or off"));
    }
}
