//! Exit codes as a type, and failures as a code with a sentence.

/// What an agent's exit code means to the cluster (OCF RA API 1.1, "Exit status codes").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// The action succeeded; from `monitor`: running (and not promoted).
    Success = 0,
    /// Something went wrong that no other code says better. The cluster retries here.
    Generic = 1,
    /// The parameters are not valid *on this node*. The cluster goes elsewhere.
    Arguments = 2,
    /// The agent does not have this action.
    Unimplemented = 3,
    /// Not enough privileges on this node.
    Permission = 4,
    /// Something that the resource needs is not installed on this node.
    NotInstalled = 5,
    /// The configuration cannot work anywhere. **Fatal**: the cluster stops the resource on every node.
    Configured = 6,
    /// Certainly and cleanly stopped.
    NotRunning = 7,
    /// Running in the promoted role.
    RunningPromoted = 8,
    /// Failed in the promoted role (crashed, or refuses to go on).
    FailedPromoted = 9,
    /// Running with reduced service.
    Degraded = 190,
    /// Running promoted with reduced service.
    DegradedPromoted = 191,
}

impl ExitCode {
    /// Every code, in ascending order.
    pub const ALL: [Self; 12] = [
        Self::Success,
        Self::Generic,
        Self::Arguments,
        Self::Unimplemented,
        Self::Permission,
        Self::NotInstalled,
        Self::Configured,
        Self::NotRunning,
        Self::RunningPromoted,
        Self::FailedPromoted,
        Self::Degraded,
        Self::DegradedPromoted,
    ];

    /// The number that the process exits with.
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}

/// Why an action did not succeed: the code is for the cluster, the reason for the person who reads `crm_mon`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// What the process exits with.
    pub code: ExitCode,
    /// One sentence: what was being done, to what, what went wrong, what to do.
    pub reason: String,
}

/// Result of an action.
pub type Result<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure with any code.
    pub fn new(code: ExitCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }
    /// [`ExitCode::Generic`]
    pub fn generic(reason: impl Into<String>) -> Self {
        Self::new(ExitCode::Generic, reason)
    }
    /// [`ExitCode::Arguments`]: wrong on this node.
    pub fn arguments(reason: impl Into<String>) -> Self {
        Self::new(ExitCode::Arguments, reason)
    }
    /// [`ExitCode::Permission`]
    pub fn permission(reason: impl Into<String>) -> Self {
        Self::new(ExitCode::Permission, reason)
    }
    /// [`ExitCode::NotInstalled`]
    pub fn not_installed(reason: impl Into<String>) -> Self {
        Self::new(ExitCode::NotInstalled, reason)
    }
    /// [`ExitCode::Configured`]: wrong everywhere.
    pub fn configured(reason: impl Into<String>) -> Self {
        Self::new(ExitCode::Configured, reason)
    }
    /// [`ExitCode::Unimplemented`]
    pub fn unimplemented(action: &str) -> Self {
        Self::new(ExitCode::Unimplemented, format!("this agent has no action {action}"))
    }
    /// The same failure, said with what was being done.
    #[must_use]
    pub fn context(self, doing: impl std::fmt::Display) -> Self {
        Self { code: self.code, reason: format!("{doing}: {}", self.reason) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_the_numbers_of_the_standard() {
        let numbers: Vec<u8> = ExitCode::ALL.iter().map(|c| c.code()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 190, 191]);
    }
}
