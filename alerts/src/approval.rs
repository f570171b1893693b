//! The question that semi-automatic evacuation asks, and its answer: types and pure functions, no clock and no cluster.
//!
//! ```text
//!  controller ── Record::ask ──► CIB: understudy-approval-ID = {request} ──► each approver: summary and a code of his own
//!                                       │  answer(): code right, in time, not decided, not guessed too often
//!  CLI, mail, hook ── code ────────────►│
//!                                       ▼
//!                                {request, decision: who, when, which way} ──► controller: state()
//! ```
//! One record, one property in the cluster: [`property`] says its name. It is changed only if it still has the revision that was
//! read, so that of two answers one counts. The record holds no secret: codes are computed from it with the cluster's key.
//!
//! Times are seconds since 1970. A question expires by the clock of the node on which it is answered, so that nodes' clocks must
//! agree as well as `expires` is meant. Before the controller acts on silence it writes the silence down ([`Record::close`]): an
//! answer that comes later is told so.

mod code;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use understudy_protocol::key::Key;

pub use code::{Code, code, whose};

/// Wrong codes that are taken for one question by mail and hook; then only the command on a node can answer it.
pub const MAX_WRONG: u32 = 5;
/// Longest summary in a record, in bytes; what is longer is cut. (The whole plan is bound by its digest.)
pub const MAX_SUMMARY: usize = 4096;
/// Longest record that is read, in bytes.
pub const MAX_RECORD: usize = 32 * 1024;
/// What the names of our properties begin with.
pub const PREFIX: &str = "understudy-approval-";

/// The approver that is always there: whoever can read the cluster's key on a node and computes the code from it.
pub const CONSOLE: &str = "console";

/// The property that holds the question of this id.
pub fn property(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// The digest of a plan: SHA-256 of any text that says all of it, as 64 hexadecimal digits.
pub fn digest(plan: &str) -> String {
    Sha256::digest(plan.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Names the question: letters, digits and dashes, at most 64.
    pub id: String,
    /// The plan's digest.
    pub plan: String,
    /// What would be done, for people.
    pub summary: String,
    /// When it was asked.
    pub asked: u64,
    /// Until when it can be answered.
    pub expires: u64,
    /// Names of those who may answer.
    pub approvers: Vec<String>,
}

/// Yes or no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Do it.
    Approve,
    /// Do not.
    Refuse,
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Approve => "approved",
            Self::Refuse => "refused",
        })
    }
}

/// How an answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// `understudy-crm approve` or `refuse` on a node.
    Cli,
    /// A mail.
    Mail,
    /// An HTTP hook.
    Hook,
    /// Nobody answered: the policy's `unanswered` decided.
    Silence,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cli => "on the command line",
            Self::Mail => "by mail",
            Self::Hook => "by hook",
            Self::Silence => "by silence",
        })
    }
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Yes or no.
    pub answer: Answer,
    /// Who: the approver whose code it was; on the command line, as it says.
    pub by: String,
    /// When.
    pub at: u64,
    /// Which way.
    pub way: Way,
}

/// Question and answer, as they stand in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counts changes; first, so that a change can name the revision that it was made from.
    pub revision: u32,
    /// What is asked.
    pub request: Request,
    /// Whether the messages to the approvers have been queued. A controller that died before says them again.
    #[serde(default)]
    pub told: bool,
    /// Wrong codes so far.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wrong: u32,
    /// What was decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What happens when nobody has answered in time (`unanswered` in the policy).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unanswered {
    /// Nothing is done.
    #[default]
    Refuse,
    /// As if it had been approved.
    Approve,
}

/// Where a question stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApprovalState {
    /// Nobody was asked.
    NotAsked,
    /// Nobody has answered.
    Waiting {
        /// Until when it can be answered.
        expires: u64,
    },
    /// Do it.
    Approved {
        /// Who said so.
        by: String,
        /// When.
        at: u64,
    },
    /// Do not.
    Refused {
        /// Who said so.
        by: String,
        /// When.
        at: u64,
    },
    /// Nobody answered, and that means no.
    Expired,
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    /// Too long.
    #[error(
        "the record of an approval has {0} bytes, more than {MAX_RECORD}: somebody else wrote it; delete the property"
    )]
    Long(usize),
    /// Not ours.
    #[error("the record of an approval cannot be read ({0}): somebody else wrote it; delete the property")]
    Json(#[from] serde_json::Error),
    /// No such name.
    #[error("{0:?} does not name a question: letters, digits and dashes, at most 64")]
    Id(String),
}

/// Who decided when nobody did.
const NOBODY: &str = "nobody";

impl Record {
    /// A question that has just been asked. A summary that is too long is cut; [`CONSOLE`] may answer too.
    pub fn ask(mut request: Request) -> Result<Self, BadRecord> {
        check_id(&request.id)?;
        request.summary = crate::alarm::cut(request.summary, MAX_SUMMARY);
        if !request.approvers.iter().any(|name| name == CONSOLE) {
            request.approvers.push(CONSOLE.into());
        }
        Ok(Self { revision: 1, request, told: false, wrong: 0, decision: None })
    }

    /// Read a property's value.
    pub fn parse(text: &str) -> Result<Self, BadRecord> {
        if text.len() > MAX_RECORD {
            return Err(BadRecord::Long(text.len()));
        }
        let record: Self = serde_json::from_str(text)?;
        check_id(&record.request.id)?;
        Ok(record)
    }

    /// The property's value. In ASCII: cibadmin refuses anything else in the locale in which Pacemaker's children run (tried with
    /// Pacemaker 3.0: `Invalid byte sequence in conversion input`).
    pub fn to_json(&self) -> String {
        // Plain data: it serialises.
        let json = serde_json::to_string(self).unwrap_or_default();
        let mut ascii = String::with_capacity(json.len());
        for c in json.chars() {
            if c.is_ascii() {
                ascii.push(c);
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
        ascii
    }

    /// What a value of this revision begins with, and no value of another one.
    pub fn revision_prefix(revision: u32) -> String {
        format!("{{\"revision\":{revision},")
    }

    /// The same after the approvers' messages have been queued.
    pub fn after_telling(&self) -> Self {
        Self { told: true, ..self.changed() }
    }

    fn changed(&self) -> Self {
        Self { revision: self.revision.saturating_add(1), ..self.clone() }
    }

    /// Nobody answered in time: the record that says so, to be stored before anything is done about it. `None` while there is
    /// time, and if it is decided.
    pub fn close(&self, now: u64, unanswered: Unanswered) -> Option<Self> {
        if self.decision.is_some() || now < self.request.expires {
            return None;
        }
        let answer = match unanswered {
            Unanswered::Refuse => Answer::Refuse,
            Unanswered::Approve => Answer::Approve,
        };
        let decision = Decision { answer, by: NOBODY.into(), at: now, way: Way::Silence };
        Some(Self { decision: Some(decision), ..self.changed() })
    }
}

fn check_id(id: &str) -> Result<(), BadRecord> {
    let good = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if good { Ok(()) } else { Err(BadRecord::Id(id.chars().take(80).collect())) }
}

/// Where a question stands: what the controller asks.
pub fn state(record: Option<&Record>, now: u64, unanswered: Unanswered) -> ApprovalState {
    let Some(record) = record else { return ApprovalState::NotAsked };
    match &record.decision {
        Some(Decision { answer: Answer::Approve, by, at, .. }) => ApprovalState::Approved { by: by.clone(), at: *at },
        Some(Decision { answer: Answer::Refuse, way: Way::Silence, .. }) => ApprovalState::Expired,
        Some(Decision { answer: Answer::Refuse, by, at, .. }) => ApprovalState::Refused { by: by.clone(), at: *at },
        None => {
            let expires = record.request.expires;
            match unanswered {
                _ if now < expires => ApprovalState::Waiting { expires },
                Unanswered::Refuse => ApprovalState::Expired,
                Unanswered::Approve => ApprovalState::Approved { by: NOBODY.into(), at: expires },
            }
        }
    }
}

/// What somebody says.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// Yes or no.
    pub answer: Answer,
    /// The code as it was typed.
    pub code: &'a str,
    /// What he calls himself; only the command line knows.
    pub name: Option<&'a str>,
    /// How it came.
    pub way: Way,
}

/// Why an answer does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Somebody was faster, or the same code came twice.
    #[error("question {id} was {answer} before, by {by} {way}: a code counts once, and this answer changes nothing")]
    Decided {
        /// The question.
        id: String,
        /// What was decided.
        answer: Answer,
        /// By whom.
        by: String,
        /// How.
        way: Way,
    },
    /// Too late.
    #[error("question {id} could be answered until {until}: this answer is too late and changes nothing", until = utc(*expires))]
    Expired {
        /// The question.
        id: String,
        /// When it expired.
        expires: u64,
    },
    /// Guessed too often.
    #[error(
        "question {id} had {MAX_WRONG} wrong codes and takes no more answers by mail or hook: answer with \
         `understudy-crm approve {id} CODE` or `refuse` on a node"
    )]
    TooMany {
        /// The question.
        id: String,
    },
    /// Not a code for this.
    #[error(
        "the code is not one for question {id}: it was typed wrongly, or belongs to another question or to a plan that has changed \
         since{}", tries(*left)
    )]
    Wrong {
        /// The question.
        id: String,
        /// How many more are taken; `None` if nobody counts.
        left: Option<u32>,
    },
}

fn tries(left: Option<u32>) -> String {
    left.map(|left| format!("; {left} more {} taken", if left == 1 { "try is" } else { "tries are" }))
        .unwrap_or_default()
}

/// Take an answer, or say why not. The record comes back if it must be stored, also with a refusal: wrong codes are counted.
///
/// The command line's wrong codes are not counted: whoever may use it may change the record itself, and closing it would let
/// strangers who send mails shut out the operator.
pub fn answer(record: &Record, key: &Key, given: &Given<'_>, now: u64) -> (Option<Record>, Result<Decision, Refusal>) {
    let id = || record.request.id.clone();
    if let Some(Decision { answer, by, way, .. }) = &record.decision {
        return (None, Err(Refusal::Decided { id: id(), answer: *answer, by: by.clone(), way: *way }));
    }
    if now >= record.request.expires {
        return (None, Err(Refusal::Expired { id: id(), expires: record.request.expires }));
    }
    let counted = given.way != Way::Cli;
    if counted && record.wrong >= MAX_WRONG {
        return (None, Err(Refusal::TooMany { id: id() }));
    }
    let whose = Code::parse(given.code).and_then(|code| whose(key, &record.request, code));
    let Some(approver) = whose else {
        if !counted {
            return (None, Err(Refusal::Wrong { id: id(), left: None }));
        }
        let wrong = record.wrong.saturating_add(1);
        let refusal = Refusal::Wrong { id: id(), left: Some(MAX_WRONG.saturating_sub(wrong)) };
        return (Some(Record { wrong, ..record.changed() }), Err(refusal));
    };
    let by = match given.name {
        Some(name) if name != approver => format!("{name} (with the code of {approver})"),
        _ => approver.to_string(),
    };
    let decision = Decision { answer: given.answer, by, at: now, way: given.way };
    (Some(Record { decision: Some(decision.clone()), ..record.changed() }), Ok(decision))
}

/// `2026-11-23 07:09:10 UTC`
pub fn utc(seconds: u64) -> String {
    // Days to a date of the proleptic Gregorian calendar, with years that begin in March (their leap day is the last day).
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march = (5 * of_year + 2) / 153;
    let (day, month) = (of_year - (153 * march + 2) / 5 + 1, if march < 10 { march + 3 } else { march - 9 });
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests;
