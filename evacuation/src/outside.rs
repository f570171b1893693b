//! Whom the controller tells and asks, behind a trait: what is not the cluster.

use std::collections::BTreeMap;

use understudy_crm::policy::Policy;
use understudy_crm::records::Plan;
use understudy_crm::xml::Element;

use crate::core::model::{Alarm, ApprovalState};

/// Whom it tells and asks.
pub trait Outside {
    /// Tell people. Quick: it queues. The error is a sentence; the alarms are in the journal all the same.
    fn tell(&mut self, alarms: &[Alarm]) -> Result<(), String>;
    /// Ask whether the plan may be carried out. Safe to repeat: nobody is asked twice. The error is a sentence.
    fn ask(&mut self, policy: &Policy, plan: &Plan, now: u64) -> Result<(), String>;
    /// Where the questions stand that this CIB knows of. What nobody answered in time is written down as that, before anything follows from it.
    fn approvals(&self, policy: &Policy, cib: &Element, now: u64) -> BTreeMap<String, ApprovalState>;
}
