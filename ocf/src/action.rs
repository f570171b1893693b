//! The actions of the standard, and what metadata says about each.

use std::fmt;

/// What a cluster can ask an agent to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Make it run (unpromoted).
    Start,
    /// Make it gone.
    Stop,
    /// Say how it is.
    Monitor,
    /// Unpromoted to promoted.
    Promote,
    /// Promoted to unpromoted.
    Demote,
    /// Something happens to an instance of the clone.
    Notify,
    /// Live migration, source's half. (Pacemaker's convention, not in the standard.)
    MigrateTo,
    /// Live migration, target's half.
    MigrateFrom,
    /// The service re-reads its own configuration.
    Reload,
    /// Parameters that are marked reloadable have changed.
    ReloadAgent,
    /// Are the parameters right? Level 0: by themselves; level 10: on this node too.
    ValidateAll,
    /// Describe yourself.
    MetaData,
}

impl Action {
    /// Every action, in the order in which metadata lists them.
    pub const ALL: [Self; 12] = [
        Self::Start,
        Self::Stop,
        Self::Monitor,
        Self::Promote,
        Self::Demote,
        Self::Notify,
        Self::MigrateTo,
        Self::MigrateFrom,
        Self::Reload,
        Self::ReloadAgent,
        Self::ValidateAll,
        Self::MetaData,
    ];

    /// The action's name on the command line and in metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Monitor => "monitor",
            Self::Promote => "promote",
            Self::Demote => "demote",
            Self::Notify => "notify",
            Self::MigrateTo => "migrate_to",
            Self::MigrateFrom => "migrate_from",
            Self::Reload => "reload",
            Self::ReloadAgent => "reload-agent",
            Self::ValidateAll => "validate-all",
            Self::MetaData => "meta-data",
        }
    }

    /// The action called `name`. (`status` is what `monitor` was called long ago; tools still use it.)
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "status" {
            return Some(Self::Monitor);
        }
        Self::ALL.into_iter().find(|a| a.name() == name)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Role of an instance, as in `<action name="monitor" role="Promoted">`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The instance that leads.
    Promoted,
    /// The others.
    Unpromoted,
}

impl Role {
    /// Name as Pacemaker 2.1 and later writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Promoted => "Promoted",
            Self::Unpromoted => "Unpromoted",
        }
    }
}

/// One `<action>` of the metadata: a *tested* timeout, and for monitors an interval and role. Times have a unit (`20s`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActionSpec {
    /// Which action.
    pub action: Action,
    /// Suggested timeout, e.g. `20s`.
    pub timeout: &'static str,
    /// Suggested interval of a recurring monitor, e.g. `10s`.
    pub interval: Option<&'static str>,
    /// Role that a monitor is for.
    pub role: Option<Role>,
    /// `OCF_CHECK_LEVEL` of a monitor.
    pub depth: Option<u8>,
}

impl ActionSpec {
    /// An action with its timeout.
    pub const fn new(action: Action, timeout: &'static str) -> Self {
        Self { action, timeout, interval: None, role: None, depth: None }
    }
    /// Recurs at `interval`.
    #[must_use]
    pub const fn every(mut self, interval: &'static str) -> Self {
        self.interval = Some(interval);
        self
    }
    /// Only for instances in `role`. Two monitors that differ in role alone need different intervals too.
    #[must_use]
    pub const fn in_role(mut self, role: Role) -> Self {
        self.role = Some(role);
        self
    }
    /// With this check level.
    #[must_use]
    pub const fn at_depth(mut self, depth: u8) -> Self {
        self.depth = Some(depth);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_is_found_by_its_name() {
        for action in Action::ALL {
            assert_eq!(Action::from_name(action.name()), Some(action));
        }
        assert_eq!(Action::from_name("status"), Some(Action::Monitor));
        assert_eq!(Action::from_name("restart"), None);
    }
}
