//! `understudy-crm approvals`, `approve` and `refuse`: the way to answer that needs neither mail nor telephone.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use understudy_alerts::answering;
use understudy_alerts::approval::{
    Answer, ApprovalState, CONSOLE, Decision, Given, Record, Unanswered, Way, code, state, utc,
};
use understudy_alerts::cluster::{Cib, Records};
use understudy_alerts::outbox::{self, Outbox};
use understudy_alerts::spool::Spool;
use understudy_protocol::key::Key;

/// A question, for `--json`.
#[derive(Debug, Serialize)]
pub struct Question<'a> {
    /// Question and answer, as they stand in the cluster.
    #[serde(flatten)]
    record: &'a Record,
    /// `waiting`, `approved`, `refused` or `expired`.
    state: &'static str,
    /// The code for this console, with `--code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
}

fn word(state: &ApprovalState) -> &'static str {
    match state {
        ApprovalState::NotAsked => "not asked",
        ApprovalState::Waiting { .. } => "waiting",
        ApprovalState::Approved { .. } => "approved",
        ApprovalState::Refused { .. } => "refused",
        ApprovalState::Expired => "expired",
    }
}

/// The questions of the cluster as text or JSON; with a key, also the code with which this console answers.
pub fn list(key: Option<&Path>, json: bool) -> Result<String> {
    let (records, settings) = (Cib::default().all()?, Cib::default().settings()?);
    let key = key.map(Key::load).transpose()?;
    let (now, silence) = (understudy_alerts::now(), settings.approval.unanswered);
    let code = |record: &Record| key.as_ref().map(|key| code(key, &record.request, CONSOLE).to_string());
    if json {
        let question =
            |record| Question { record, state: word(&state(Some(record), now, silence)), code: code(record) };
        let questions: Vec<_> = records.iter().map(question).collect();
        return Ok(serde_json::to_string_pretty(&questions)? + "\n");
    }
    if records.is_empty() {
        return Ok("nobody is asked anything\n".into());
    }
    Ok(records.iter().map(|record| text(record, now, silence, code(record))).collect())
}

fn text(record: &Record, now: u64, silence: Unanswered, code: Option<String>) -> String {
    let state = state(Some(record), now, silence);
    let mut text = format!("{}  {}", record.request.id, word(&state));
    match (&state, &record.decision) {
        (ApprovalState::Waiting { expires }, _) => {
            let _ = write!(text, " until {}", utc(*expires));
        }
        (_, Some(Decision { by, at, way, .. })) => {
            let _ = write!(text, " by {by} {way} on {}", utc(*at));
        }
        _ => {}
    }
    if record.wrong > 0 {
        let _ = write!(text, ", {} wrong code{}", record.wrong, if record.wrong == 1 { "" } else { "s" });
    }
    text.push('\n');
    for line in record.request.summary.lines() {
        let _ = writeln!(text, "    {line}");
    }
    if let (ApprovalState::Waiting { .. }, Some(code)) = (&state, code) {
        let _ = writeln!(
            text,
            "    understudy-crm approve {0} {code}\n    understudy-crm refuse {0} {code}",
            record.request.id
        );
    }
    text
}

/// Answer question `id`. What was decided is in the cluster, in the journal, and told to the approvers.
pub fn answer(answer: Answer, id: &str, code: &str, name: Option<&str>, key: &Path) -> Result<Decision> {
    let key = Key::load(key)?;
    let given = Given { answer, code, name, way: Way::Cli };
    // Without a queue the answer counts all the same; it is only not told further.
    let spool = Spool::open(outbox::directory());
    let note = |line: &understudy_alerts::journal::Line<'_>| {
        if let Ok(spool) = &spool {
            spool.note(line);
        }
    };
    let result = answering::answer(&Cib::default(), &key, id, &given, understudy_alerts::now(), &note);
    if result.is_ok() {
        let told = spool.as_ref().map_err(ToString::to_string).and_then(|spool| {
            let settings = Cib::default().settings().map_err(|e| e.to_string())?;
            let outbox = Outbox::new(spool.clone(), settings, outbox::sender());
            let alarm = answering::outcome(id, Way::Cli, &result);
            let approvers = outbox.settings().recipients.iter().filter(|recipient| recipient.approves);
            // All of them, also if one cannot be told.
            let told: Vec<_> = approvers.map(|to| outbox.tell_one(to, &alarm)).collect();
            told.into_iter().collect::<Result<(), _>>().map_err(|e| e.to_string())
        });
        if let Err(why) = told {
            eprintln!("understudy-crm: the answer counts, but the other approvers are not told of it: {why}");
        }
    }
    result.with_context(|| format!("the answer to {id} does not count"))
}

/// Who sits here: the user that became root, else the user.
pub fn who() -> Option<String> {
    ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok()).filter(|name| !name.is_empty())
}
