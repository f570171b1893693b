//! Asking and answering: the pure rules of [`crate::approval`], the records in the cluster and the journal, put together.

use understudy_protocol::key::Key;

use crate::alarm::{Alarm, Severity, Trouble, cut};
use crate::approval::{self, Answer, Decision, Given, Record, Refusal, Request, Unanswered, Way, code, utc};
use crate::cluster::{ClusterError, Records};
use crate::journal::Line;
use crate::outbox::Outbox;
use crate::settings::{Recipient, Settings};

/// So often a record is read again because somebody else changed it in between.
const ATTEMPTS: u32 = 20;

/// Why an answer was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// No such question.
    #[error("there is no question {0}: `understudy-crm approvals` lists those that there are")]
    Unknown(String),
    /// It does not count.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The cluster could not be asked.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// No question can be asked so.
    #[error(transparent)]
    Bad(#[from] approval::BadRecord),
}

/// Take an answer to question `id`: when this returns a decision, it is in the cluster. `note` writes the journal.
pub fn answer(
    records: &dyn Records,
    key: &Key,
    id: &str,
    given: &Given<'_>,
    now: u64,
    note: &dyn Fn(&Line<'_>),
) -> Result<Decision, AnswerError> {
    let result = decide(records, key, id, given, now);
    let way = Some(given.way.to_string());
    match &result {
        Ok(decision) => note(&Line {
            question: Some(id),
            by: Some(&decision.by),
            way,
            why: Some(decision.answer.to_string()),
            ..Line::new(now, "decided")
        }),
        Err(e) => note(&Line {
            question: Some(&cut(id.to_owned(), 80)),
            by: given.name,
            way,
            why: Some(e.to_string()),
            ..Line::new(now, "refused")
        }),
    }
    result
}

fn decide(records: &dyn Records, key: &Key, id: &str, given: &Given<'_>, now: u64) -> Result<Decision, AnswerError> {
    for _ in 0..ATTEMPTS {
        let record = records.get(id)?.ok_or_else(|| AnswerError::Unknown(cut(id.to_owned(), 80)))?;
        let (changed, result) = approval::answer(&record, key, given, now);
        let stored = match changed {
            Some(changed) => records.put(&changed, Some(record.revision))?,
            None => true,
        };
        if stored {
            return result.map_err(AnswerError::Refused);
        }
    }
    Err(ClusterError::Busy(id.to_owned()).into())
}

/// Write down that nobody answered in time, before anything is done about it. The record as it then is; also if somebody answered in
/// the last moment.
pub fn close(
    records: &dyn Records,
    id: &str,
    now: u64,
    unanswered: Unanswered,
) -> Result<Option<Record>, ClusterError> {
    for _ in 0..ATTEMPTS {
        let Some(record) = records.get(id)? else { return Ok(None) };
        let Some(closed) = record.close(now, unanswered) else { return Ok(Some(record)) };
        if records.put(&closed, Some(record.revision))? {
            return Ok(Some(closed));
        }
    }
    Err(ClusterError::Busy(id.to_owned()))
}

/// Ask. `request.approvers` and `request.expires` are filled in from the settings.
///
/// Safe to repeat: as long as the same plan waits for its answer nothing is asked twice, and approvers that a controller did not come to
/// tell before it died are told now. Another plan under the same id, or one that was decided, is a new question with new codes.
/// `tell` queues a message; who could not be told is in the second part.
pub fn ask(
    records: &dyn Records,
    key: &Key,
    settings: &Settings,
    mut request: Request,
    tell: &dyn Fn(&Recipient, &Alarm) -> Result<(), Trouble>,
    now: u64,
) -> Result<(Record, Vec<Trouble>), AnswerError> {
    let approvers = || settings.recipients.iter().filter(|recipient| recipient.approves);
    request.approvers = approvers().map(|recipient| recipient.name.clone()).collect();
    (request.asked, request.expires) = (now, now.saturating_add(settings.approval.expires));
    let new = Record::ask(request)?;
    let id = new.request.id.clone();
    for _ in 0..ATTEMPTS {
        let before = records.get(&id)?;
        let waits = before.as_ref().filter(|record| {
            record.decision.is_none() && record.request.plan == new.request.plan && now < record.request.expires
        });
        let record = match (waits, &before) {
            (Some(waiting), _) if waiting.told => return Ok((waiting.clone(), Vec::new())),
            (Some(waiting), _) => waiting.clone(),
            (None, before) => {
                let over = before.as_ref().map(|record| record.revision);
                // Revisions go on: somebody may just be changing the one before.
                let fresh = Record { revision: over.unwrap_or(0).saturating_add(1), ..new.clone() };
                if !records.put(&fresh, over)? {
                    continue;
                }
                fresh
            }
        };
        let troubles: Vec<Trouble> = approvers()
            .filter(|recipient| record.request.approvers.contains(&recipient.name))
            .filter_map(|recipient| tell(recipient, &question(&record, key, recipient, settings)).err())
            .collect();
        let told = record.after_telling();
        if troubles.is_empty() && records.put(&told, Some(record.revision))? {
            return Ok((told, troubles));
        }
        // Answered in this moment, or to be told again by the next call.
        return Ok((records.get(&id)?.unwrap_or(record), troubles));
    }
    Err(ClusterError::Busy(id).into())
}

/// [`ask`] in the cluster on this node, with this node's queue and journal.
pub fn ask_all(outbox: &Outbox, records: &dyn Records, key: &Key, request: Request) -> Result<Record, AnswerError> {
    let now = crate::now();
    let (record, troubles) = ask(records, key, outbox.settings(), request, &|r, a| outbox.tell_one(r, a), now)?;
    let why = troubles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let why = Some(why).filter(|why| !why.is_empty());
    outbox.spool().note(&Line { question: Some(&record.request.id), why, ..Line::new(now, "asked") });
    Ok(record)
}

/// What an approver reads.
pub fn question(record: &Record, key: &Key, recipient: &Recipient, settings: &Settings) -> Alarm {
    let Request { id, summary, expires, .. } = &record.request;
    let code = code(key, &record.request, &recipient.name);
    let until = utc(*expires);
    let silence = match settings.approval.unanswered {
        Unanswered::Refuse => "nothing is done",
        Unanswered::Approve => "it is done",
    };
    let mut text =
        format!("{summary}\n\nThis waits for somebody's answer. If nobody has answered by {until}, {silence}.\n\n");
    text.push_str(&format!("Your code is {code}. It is good once, for this plan only.\n\n"));
    if settings.delivery.mail.reply_to.is_some() {
        text.push_str(&format!("Answer this mail, with one of these as the first line:\n    APPROVE {id} {code}\n    REFUSE {id} {code}\n\nOr run "));
    } else {
        text.push_str("Run ");
    }
    text.push_str(&format!(
        "on a node of the cluster:\n    understudy-crm approve {id} {code}\n    understudy-crm refuse {id} {code}\n"
    ));
    let first = cut(summary.lines().next().unwrap_or_default().to_owned(), 80);
    let short = format!("{id}: {first} APPROVE {id} {code} or REFUSE {id} {code} by {until}");
    // No key: a question is never counted away.
    let alarm = Alarm::new(Severity::Critical, format!("Approval needed for {id}: {first}"), text);
    Alarm { short: Some(short), ..alarm }
}

/// What all approvers are told when somebody answered, or tried to.
pub fn outcome(id: &str, way: Way, result: &Result<Decision, AnswerError>) -> Alarm {
    let id = cut(id.to_owned(), 80);
    match result {
        Ok(Decision { answer, by, at, way }) => {
            let severity = if *answer == Answer::Approve { Severity::Warning } else { Severity::Critical };
            let text = format!("Question {id} was {answer} by {by} {way} on {}.", utc(*at));
            Alarm::new(severity, format!("{id} was {answer} by {by}"), text)
        }
        Err(e) => {
            let text = format!("Somebody answered question {id} {way}, and it does not count: {e}.");
            Alarm::new(Severity::Warning, format!("an answer to {id} does not count"), text).key(format!("answer {id}"))
        }
    }
}

#[cfg(test)]
mod tests;
