//! The cluster's configuration, as far as alerts and approval need it, through Pacemaker's own `cibadmin`.
//!
//! A question is one `<nvpair>` in the property set `understudy-evacuation`. It is changed by an XPath that finds it only if it still
//! has the revision that was read: the cluster carries out one change after the other, so of two answers the second finds nothing
//! and is read again (tried with Pacemaker 3.0: `No such device or address`, exit status 105).
//!
//! With `CIB_file` in the environment the tools work on that file, as all of Pacemaker's do.

use std::collections::BTreeMap;
use std::process::Command;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use crate::approval::{BadRecord, PREFIX, Record, property};
use crate::settings::{Approval, Delivery, Recipient, Settings};

/// The property set of the evacuation's state.
pub const SET: &str = "understudy-evacuation";
/// Id of the `<alert>` with our recipients.
pub const ALERT: &str = "understudy-alert";
/// `No such device or address`: nothing matches (Pacemaker's CRM_EX_NOSUCH).
const NO_SUCH: i32 = 105;

/// Why the cluster could not be asked, or would not change.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The tool is missing.
    #[error("cannot run {program}: {cause}. It is one of Pacemaker's command line tools (package pacemaker-cli-utils)")]
    Missing {
        /// The program.
        program: &'static str,
        /// What the kernel said.
        cause: std::io::Error,
    },
    /// It failed.
    #[error(
        "{program} failed ({status}): {said}. Does the cluster run on this node, and are you root or in the group haclient?"
    )]
    Failed {
        /// The program.
        program: &'static str,
        /// Its exit status.
        status: String,
        /// Its words.
        said: String,
    },
    /// What it printed is not XML.
    #[error("cannot read what cibadmin printed: {0}")]
    Xml(String),
    /// A record that cannot be read.
    #[error("{name}: {cause}")]
    Record {
        /// The property.
        name: String,
        /// Why.
        cause: BadRecord,
    },
    /// Others keep changing it.
    #[error("question {0} was changed by others all the time; try again")]
    Busy(String),
}

/// A property's name, and the record in it.
pub type Named = (String, Result<Record, BadRecord>);

/// Where records are: the cluster, or a test's.
pub trait Records {
    /// The question of this id.
    fn get(&self, id: &str) -> Result<Option<Record>, ClusterError>;
    /// All of them.
    fn all(&self) -> Result<Vec<Record>, ClusterError>;
    /// Put `record` in place of the one with this revision, or where there is none. `false`: there is another by now.
    fn put(&self, record: &Record, over: Option<u32>) -> Result<bool, ClusterError>;
    /// Forget a question.
    fn remove(&self, record: &Record) -> Result<(), ClusterError>;
}

/// The cluster that runs on this node.
#[derive(Debug, Clone, Default)]
pub struct Cib {
    before: Vec<String>,
}

impl Cib {
    /// Pacemaker's tools are called by this command, with their own words at its end: tests have them elsewhere.
    pub fn through(before: Vec<String>) -> Self {
        Self { before }
    }

    fn run(&self, program: &'static str, arguments: &[&str], also: &[i32]) -> Result<(i32, String), ClusterError> {
        let mut words = self.before.iter().map(String::as_str).chain([program]).chain(arguments.iter().copied());
        let mut command = Command::new(words.next().unwrap_or(program));
        run(program, command.args(words), also)
    }

    /// What the configuration says of alerts.
    pub fn settings(&self) -> Result<Settings, ClusterError> {
        let xpath = format!("//alerts/alert[@id='{ALERT}']");
        let (code, text) = self.run("cibadmin", &["--query", "--xpath", &xpath], &[NO_SUCH])?;
        if code == NO_SUCH { Ok(Settings::default()) } else { settings(&text) }
    }

    fn questions(&self) -> Result<Vec<Named>, ClusterError> {
        let xpath = format!("//crm_config//nvpair[starts-with(@name,'{PREFIX}')]");
        let (code, text) = self.run("cibadmin", &["--query", "--xpath", &xpath], &[NO_SUCH])?;
        if code == NO_SUCH { Ok(Vec::new()) } else { records(&text) }
    }

    /// The names of the nodes in this partition.
    pub fn members(&self) -> Result<Vec<String>, ClusterError> {
        let (_, text) = self.run("crm_node", &["--partition"], &[])?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }
}

impl Records for Cib {
    fn get(&self, id: &str) -> Result<Option<Record>, ClusterError> {
        let wanted = property(id);
        match self.questions()?.into_iter().find(|(name, _)| *name == wanted) {
            None => Ok(None),
            Some((_, Ok(record))) => Ok(Some(record)),
            Some((name, Err(cause))) => Err(ClusterError::Record { name, cause }),
        }
    }

    fn all(&self) -> Result<Vec<Record>, ClusterError> {
        // One that cannot be read does not hide the others.
        let said =
            |(name, record): Named| record.map_err(|cause| eprintln!("{}", ClusterError::Record { name, cause })).ok();
        Ok(self.questions()?.into_iter().filter_map(said).collect())
    }

    fn put(&self, record: &Record, over: Option<u32>) -> Result<bool, ClusterError> {
        let name = property(&record.request.id);
        let value = escaped(&record.to_json());
        let pair = format!("<nvpair id=\"{name}\" name=\"{name}\" value=\"{value}\"/>");
        if let Some(revision) = over {
            let begins = Record::revision_prefix(revision);
            let xpath = format!("//crm_config//nvpair[@id='{name}' and starts-with(@value,'{begins}')]");
            let (code, _) = self.run("cibadmin", &["--modify", "--xpath", &xpath, "--xml-text", &pair], &[NO_SUCH])?;
            return Ok(code != NO_SUCH);
        }
        if self.get(&record.request.id)?.is_some() {
            return Ok(false);
        }
        // Not exclusive (cibadmin has no way to create a pair only if there is none): of two that ask the same at once, the later one's
        // codes count. There is one controller.
        let set = format!("<cluster_property_set id=\"{SET}\">{pair}</cluster_property_set>");
        self.run("cibadmin", &["--modify", "--allow-create", "--scope", "crm_config", "--xml-text", &set], &[])?;
        Ok(true)
    }

    fn remove(&self, record: &Record) -> Result<(), ClusterError> {
        let xpath = format!("//crm_config//nvpair[@id='{}']", property(&record.request.id));
        self.run("cibadmin", &["--delete", "--xpath", &xpath], &[NO_SUCH]).map(drop)
    }
}

/// As an attribute's value in double quotes.
fn escaped(text: &str) -> String {
    quick_xml::escape::escape(text).replace('\n', "&#10;").replace('\t', "&#9;")
}

/// Run one of Pacemaker's tools: its exit status, 0 or one of `also`, and what it printed.
fn run(program: &'static str, command: &mut Command, also: &[i32]) -> Result<(i32, String), ClusterError> {
    let output = command.output().map_err(|cause| ClusterError::Missing { program, cause })?;
    match output.status.code() {
        Some(code) if code == 0 || also.contains(&code) => {
            Ok((code, String::from_utf8_lossy(&output.stdout).into_owned()))
        }
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            Err(ClusterError::Failed { program, status: output.status.to_string(), said })
        }
    }
}

/// An element's attributes.
fn attributes(element: &BytesStart<'_>) -> Result<BTreeMap<String, String>, ClusterError> {
    let wrong = |e: &dyn std::fmt::Display| ClusterError::Xml(e.to_string());
    let pairs = element.attributes().map(|attribute| {
        let attribute = attribute.map_err(|e| wrong(&e))?;
        let name = String::from_utf8_lossy(attribute.key.as_ref()).into_owned();
        Ok((name, attribute.unescape_value().map_err(|e| wrong(&e))?.into_owned()))
    });
    pairs.collect()
}

/// Every element's beginning and end, in order. `true` for a beginning.
fn walk(text: &str, mut see: impl FnMut(bool, &str, BTreeMap<String, String>)) -> Result<(), ClusterError> {
    let mut reader = Reader::from_str(text);
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    loop {
        match reader.read_event().map_err(|e| ClusterError::Xml(e.to_string()))? {
            Event::Eof => return Ok(()),
            Event::Start(start) => see(true, &name(start.name().as_ref()), attributes(&start)?),
            Event::Empty(start) => {
                let element = name(start.name().as_ref());
                see(true, &element, attributes(&start)?);
                see(false, &element, BTreeMap::new());
            }
            Event::End(end) => see(false, &name(end.name().as_ref()), BTreeMap::new()),
            _ => {}
        }
    }
}

/// The questions in what cibadmin printed, each under its property's name.
pub fn records(text: &str) -> Result<Vec<Named>, ClusterError> {
    let mut values = Vec::new();
    walk(text, |begins, element, mut attributes| {
        if begins && element == "nvpair" {
            let name = attributes.remove("name").unwrap_or_default();
            if name.starts_with(PREFIX) {
                values.push((name, attributes.remove("value").unwrap_or_default()));
            }
        }
    })?;
    let read = |(name, value): (String, String)| {
        // The name is what it is found by: a record under another one would never be changed.
        let ours = Record::parse(&value).and_then(|record| match property(&record.request.id) == name {
            true => Ok(record),
            false => Err(BadRecord::Id(record.request.id)),
        });
        (name, ours)
    };
    Ok(values.into_iter().map(read).collect())
}

/// The settings in what cibadmin printed of our alert. A recipient that cannot be understood is said on standard error and left out:
/// the others are told.
pub fn settings(text: &str) -> Result<Settings, ClusterError> {
    #[derive(Default)]
    struct Open {
        value: Option<String>,
        pairs: BTreeMap<String, String>,
    }
    let (mut alert, mut recipient, mut recipients) = (Open::default(), None::<Open>, Vec::new());
    walk(text, |begins, element, mut attributes| match (element, begins) {
        ("recipient", true) => recipient = Some(Open { value: attributes.remove("value"), ..Open::default() }),
        ("recipient", false) => recipients.extend(recipient.take()),
        ("nvpair", true) => {
            let open = recipient.as_mut().unwrap_or(&mut alert);
            let (name, value) = (attributes.remove("name"), attributes.remove("value"));
            open.pairs.insert(name.unwrap_or_default(), value.unwrap_or_default());
        }
        _ => {}
    })?;
    let said = |e: crate::settings::BadAttribute| eprintln!("understudy-alert: {e}");
    let get = |name: &str| alert.pairs.get(name).cloned();
    let recipients = recipients.into_iter().filter_map(|open| {
        let value = open.value.unwrap_or_default();
        Recipient::read(&value, &|name| open.pairs.get(name).cloned()).map_err(said).ok()
    });
    Ok(Settings {
        recipients: recipients.collect(),
        delivery: Delivery::read(&get).map_err(said).unwrap_or_default(),
        approval: Approval::read(&get).map_err(said).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::approval::{Request, digest};
    use crate::settings::Kind;

    #[test]
    fn a_record_passes_through_xml() {
        let request = Request {
            id: "n1-17".into(),
            plan: digest("p"),
            summary: "web1 \"to\" n2\n\t<'&>".into(),
            asked: 1,
            expires: 2,
            approvers: vec!["a".into()],
        };
        let record = Record::ask(request).unwrap();
        let text = format!(
            "<xpath-query><nvpair id=\"x\" name=\"understudy-approval-n1-17\" value=\"{}\"/><nvpair name=\"other\"/></xpath-query>",
            escaped(&record.to_json())
        );
        let read = records(&text).unwrap();
        assert_eq!((read.len(), read[0].1.as_ref().unwrap()), (1, &record));
        let elsewhere = records(&text.replace("approval-n1-17", "approval-n1-18")).unwrap();
        assert!(elsewhere[0].1.is_err());
        assert!(records("<a").is_err());
    }

    #[test]
    fn settings_are_found_in_the_alert() {
        let text = "<alert id=\"understudy-alert\" path=\"/x\"><instance_attributes id=\"i\">\
            <nvpair id=\"a\" name=\"mail_server\" value=\"mail.example\"/><nvpair id=\"b\" name=\"approval_expires\" value=\"60\"/>\
            </instance_attributes><recipient id=\"r\" value=\"a@b.example\"><instance_attributes id=\"j\">\
            <nvpair id=\"c\" name=\"kind\" value=\"mail\"/></instance_attributes></recipient>\
            <recipient id=\"s\" value=\"?\"><instance_attributes id=\"k\"><nvpair id=\"d\" name=\"kind\" value=\"pigeon\"/>\
            </instance_attributes></recipient></alert>";
        let settings = settings(text).unwrap();
        assert_eq!(settings.recipients.len(), 1);
        assert_eq!((settings.recipients[0].kind, settings.recipients[0].to.as_str()), (Kind::Mail, "a@b.example"));
        assert_eq!((settings.delivery.mail.server.as_str(), settings.approval.expires), ("mail.example", 60));
    }
}
