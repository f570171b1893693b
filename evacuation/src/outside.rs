//! Whom the controller tells and asks, behind a trait: what is not the cluster.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use understudy_crm::policy::Policy;
use understudy_crm::records::Plan;
use understudy_crm::xml::Element;

use crate::core::model::{Alarm, ApprovalState};

/// Whom it tells and asks.
pub trait Outside {
    /// Tell people. Quick: it queues. The error is a sentence; the alarm is in the journal all the same.
    fn tell(&mut self, alarm: &Alarm) -> Result<(), String>;
    /// Ask whether the plan may be carried out, unless it has been asked. The error is a sentence.
    fn ask(&mut self, policy: &Policy, plan: &Plan, now: u64) -> Result<(), String>;
    /// Where the questions stand that this CIB knows of.
    fn approvals(&self, policy: &Policy, cib: &Element, now: u64) -> BTreeMap<String, ApprovalState>;
}

/// Tells by a program, `understudy-alert`, or by nothing but the journal.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// `understudy-alert`; `None`: it is not installed.
    pub tell: Option<PathBuf>,
}

impl Outside for Program {
    fn tell(&mut self, alarm: &Alarm) -> Result<(), String> {
        let Some(program) = &self.tell else { return Ok(()) };
        let mut command = Command::new(program);
        command.args(["tell", "--severity", "critical", "--key", &alarm.key]);
        if let Some(machine) = &alarm.machine {
            command.args(["--machine", machine]);
        }
        let subject: String = alarm.text.chars().take(120).collect();
        let status = command.args(["--", &subject, &alarm.text]).stdin(Stdio::null()).stdout(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{} failed ({status}): nobody may have been told", program.display())),
            Err(e) => Err(format!("{} could not be run ({e}): nobody has been told", program.display())),
        }
    }

    fn ask(&mut self, _: &Policy, plan: &Plan, _: u64) -> Result<(), String> {
        Err(format!(
            "nobody can be asked about plan {0} in this version: decide with understudy-evacuator release {0} or cancel {0}",
            plan.id
        ))
    }

    fn approvals(&self, _: &Policy, _: &Element, _: u64) -> BTreeMap<String, ApprovalState> {
        BTreeMap::new()
    }
}
