//! The people in the policy's `[[alerts]]`: alarms go into this node's queue, questions about plans to those who may approve.
//!
//! ```text
//!   plan of a semi-automatic cluster ─► ask ─► record in the cluster, a code for each approver
//!   next rounds: standing(record) ─► Waiting … Approved | Refused | Due ─► silence is written down ─► Expired
//! ```
//! A record counts only for the plan whose digest it has, and as asked only when its messages have been queued: a controller that died
//! before that has its successor ask again.

use std::collections::BTreeMap;
use std::path::Path;

use understudy_alerts::alarm::{Alarm as Told, Severity, Sink};
use understudy_alerts::answering::{ask_all, close};
use understudy_alerts::approval::{self, Answer, Decision, Record, Request, Way, property};
use understudy_alerts::cluster::Cib;
use understudy_alerts::outbox::Outbox;
use understudy_crm::estate::Unanswered;
use understudy_crm::policy::Policy;
use understudy_crm::records::{self, Plan};
use understudy_crm::xml::Element;
use understudy_protocol::key::Key;

use crate::core::model::{Alarm, ApprovalState};
use crate::outside::Outside;

/// Longest subject of an alarm, in characters.
const SUBJECT: usize = 120;

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct People;

impl Outside for People {
    fn tell(&mut self, alarms: &[Alarm]) -> Result<(), String> {
        if alarms.is_empty() {
            return Ok(());
        }
        let outbox = Outbox::open().map_err(|e| format!("nobody is told: {e}"))?;
        let mut trouble = Ok(());
        for alarm in alarms {
            let subject: String = alarm.text.chars().take(SUBJECT).collect();
            let told = Told::new(Severity::Critical, subject, alarm.text.clone()).key(alarm.key.clone());
            let told = match &alarm.machine {
                Some(machine) => told.machine(machine.clone()),
                None => told,
            };
            if let Err(e) = outbox.tell(&told) {
                trouble = Err(format!("not everybody is told: {e}"));
            }
        }
        trouble
    }

    fn ask(&mut self, policy: &Policy, plan: &Plan, now: u64) -> Result<(), String> {
        let id = &plan.id;
        let failed = |why: String| {
            format!(
                "nobody was asked about plan {id}: {why}. Decide with understudy-evacuator release {id}, or cancel {id}"
            )
        };
        let outbox = Outbox::open().map_err(|e| failed(e.to_string()))?;
        if !outbox.settings().recipients.iter().any(|recipient| recipient.approves) {
            return Err(failed("no [[alerts]] of the policy has approves = true".into()));
        }
        let key = Key::load(Path::new(policy.cluster.key.get_ref())).map_err(|e| failed(e.to_string()))?;
        let request = Request {
            id: id.clone(),
            plan: plan.digest(),
            summary: plan.summary(),
            // These three are the policy's, as it was applied.
            asked: now,
            expires: now,
            approvers: Vec::new(),
        };
        ask_all(&outbox, &Cib::default(), &key, request).map(drop).map_err(|e| failed(e.to_string()))
    }

    fn approvals(&self, policy: &Policy, cib: &Element, now: u64) -> BTreeMap<String, ApprovalState> {
        let unanswered = match policy.approval.unwrap_or_default().unanswered {
            Unanswered::Refuse => approval::Unanswered::Refuse,
            Unanswered::Approve => approval::Unanswered::Approve,
        };
        let Ok(known) = records::read(cib) else { return BTreeMap::new() };
        let open = known.plans.iter().filter(|plan| plan.closed.is_none());
        let states = open.filter_map(|plan| {
            let record = Record::parse(records::property(cib, &property(&plan.id))?).ok()?;
            let state = match standing(&record, &plan.digest(), now) {
                Standing::Is(state) => state,
                Standing::Due => match close(&Cib::default(), &plan.id, now, unanswered) {
                    Ok(Some(closed)) => match standing(&closed, &plan.digest(), now) {
                        Standing::Is(state) => state,
                        Standing::Due => ApprovalState::Waiting { expires: now },
                    },
                    Ok(None) => ApprovalState::NotAsked,
                    Err(e) => {
                        eprintln!(
                            "understudy-evacuator: that nobody answered about {} could not be written down: {e}",
                            plan.id
                        );
                        ApprovalState::Waiting { expires: now }
                    }
                },
            };
            Some((plan.id.clone(), state))
        });
        states.collect()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Is(ApprovalState),
    /// Its time is over, and that stands nowhere yet.
    Due,
}

fn standing(record: &Record, plan: &str, now: u64) -> Standing {
    // Of another plan that once had this number.
    if record.request.plan != plan {
        return Standing::Is(ApprovalState::NotAsked);
    }
    Standing::Is(match &record.decision {
        // What follows from silence is the controller's to say.
        Some(Decision { way: Way::Silence, .. }) => ApprovalState::Expired,
        Some(Decision { answer: Answer::Approve, by, .. }) => ApprovalState::Approved { by: by.clone() },
        Some(Decision { answer: Answer::Refuse, by, .. }) => ApprovalState::Refused { by: by.clone() },
        None if now >= record.request.expires => return Standing::Due,
        None if !record.told => ApprovalState::NotAsked,
        None => ApprovalState::Waiting { expires: record.request.expires },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000;

    fn record(told: bool, decision: Option<(Answer, Way)>) -> Record {
        let request = Request {
            id: "p1".into(),
            plan: "digest".into(),
            summary: "n1 lost".into(),
            asked: NOW,
            expires: NOW + 900,
            approvers: vec!["night".into()],
        };
        let decision = decision.map(|(answer, way)| Decision { answer, by: "night".into(), at: NOW, way });
        Record { revision: 3, request, told, wrong: 0, decision }
    }

    #[test]
    fn a_question_stands_where_its_record_says() {
        let is = |record: &Record, now| match standing(record, "digest", now) {
            Standing::Is(state) => Some(state),
            Standing::Due => None,
        };
        let by = || "night".to_owned();
        assert_eq!(is(&record(true, None), NOW), Some(ApprovalState::Waiting { expires: NOW + 900 }));
        assert_eq!(is(&record(true, None), NOW + 900), None, "silence is written down first");
        let yes = record(true, Some((Answer::Approve, Way::Mail)));
        assert_eq!(is(&yes, NOW + 9_000), Some(ApprovalState::Approved { by: by() }), "an answer in time stays one");
        let no = record(true, Some((Answer::Refuse, Way::Cli)));
        assert_eq!(is(&no, NOW), Some(ApprovalState::Refused { by: by() }));
        for answer in [Answer::Approve, Answer::Refuse] {
            assert_eq!(is(&record(true, Some((answer, Way::Silence))), NOW), Some(ApprovalState::Expired));
        }
    }

    /// A controller that died while it queued the messages.
    #[test]
    fn who_was_not_told_is_asked_again() {
        assert_eq!(standing(&record(false, None), "digest", NOW), Standing::Is(ApprovalState::NotAsked));
    }

    #[test]
    fn an_answer_to_another_plan_is_none_to_this() {
        let yes = record(true, Some((Answer::Approve, Way::Mail)));
        assert_eq!(standing(&yes, "another", NOW), Standing::Is(ApprovalState::NotAsked));
    }
}
