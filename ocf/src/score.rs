//! Promotion scores: how an instance says how good a promoted one it would be.
//!
//! No score means "never promote me". The score is the transient node attribute `master-<resource>`, written with
//! `crm_attribute --promotion` (Pacemaker 2.1). Writing it is never fatal: an agent under test has no cluster to write to.

use std::fmt;

use crate::command::{self, CommandError};
use crate::deadline::Deadline;
use crate::environment::Environment;

/// Why a score was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// `crm_attribute` did not run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// `crm_attribute` said no.
    #[error("crm_attribute could not {doing} the promotion score of {resource}: {complaint}")]
    Refused {
        /// `set`, `delete` or `read`.
        doing: &'static str,
        /// The resource.
        resource: String,
        /// What it said.
        complaint: String,
    },
}

/// The promotion score of one resource on this node.
#[derive(Debug, Clone)]
pub struct PromotionScore<'a> {
    env: &'a Environment,
    resource: String,
}

impl<'a> PromotionScore<'a> {
    /// Of the resource that this call is about.
    pub fn of_self(env: &'a Environment) -> Self {
        Self::of(env, env.resource())
    }

    /// Of another resource (its primitive's name, without a clone number).
    pub fn of(env: &'a Environment, resource: &str) -> Self {
        Self { env, resource: resource.to_owned() }
    }

    /// Name of the node attribute that holds it.
    pub fn attribute(&self) -> String {
        format!("master-{}", self.resource)
    }

    /// Set it.
    pub fn set(&self, score: i32, deadline: Deadline) -> Result<(), ScoreError> {
        self.call("set", &["-v", &score.to_string()], deadline).map(drop)
    }

    /// Delete it: never promote this instance. It is no error if there was none.
    pub fn delete(&self, deadline: Deadline) -> Result<(), ScoreError> {
        self.call("delete", &["-D"], deadline).map(drop)
    }

    /// Read it; `None` if there is none (or no cluster that would know).
    pub fn read(&self, deadline: Deadline) -> Option<i32> {
        self.call("read", &["-G", "-q"], deadline).ok()?.trim().parse().ok()
    }

    fn call(&self, doing: &'static str, what: &[&str], deadline: Deadline) -> Result<String, ScoreError> {
        let promotion = format!("--promotion={}", self.resource);
        let mut arguments = vec![promotion.as_str(), "-l", "reboot"];
        arguments.extend(what);
        let output = command::run(self.env, "crm_attribute", &arguments, deadline)?;
        if output.success() {
            return Ok(output.stdout);
        }
        Err(ScoreError::Refused { doing, resource: self.resource.clone(), complaint: output.complaint() })
    }
}

impl fmt::Display for PromotionScore<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the promotion score of {}", self.resource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn without_a_cluster_there_is_an_error_to_log_and_no_score() {
        let env = Environment::from_pairs([("PATH", "/nonexistent"), ("OCF_RESOURCE_INSTANCE", "vm:0")]);
        let score = PromotionScore::of_self(&env);
        let soon = Deadline::after(Duration::from_secs(5));
        assert_eq!(score.attribute(), "master-vm");
        assert_eq!(score.set(5, soon).unwrap_err().to_string(), "crm_attribute is not installed");
        assert_eq!(score.read(soon), None);
    }

    #[test]
    fn the_tool_is_called_with_the_options_of_pacemaker_2_1() {
        let dir = tempfile::tempdir().unwrap();
        let tool = dir.path().join("crm_attribute");
        std::fs::write(&tool, "#!/bin/sh\necho \"$*\" >> \"$0.calls\"\necho 10000\n").unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
        let env = Environment::from_pairs([("PATH", format!("{}:/bin", dir.path().display()))]);
        let score = PromotionScore::of(&env, "vm");
        let soon = Deadline::after(Duration::from_secs(10));
        // Another test's fork may still hold the file open for writing (ETXTBSY); that passes.
        soon.wait_for(|| match score.set(-5, soon) {
            Err(ScoreError::Command(CommandError::Spawn { .. })) => None,
            Err(e) => panic!("{e}"),
            Ok(()) => Some(()),
        })
        .unwrap();
        assert_eq!(score.read(soon), Some(10000));
        score.delete(soon).unwrap();
        let calls = std::fs::read_to_string(dir.path().join("crm_attribute.calls")).unwrap();
        assert_eq!(
            calls,
            "--promotion=vm -l reboot -v -5\n--promotion=vm -l reboot -G -q\n--promotion=vm -l reboot -D\n"
        );
    }
}
