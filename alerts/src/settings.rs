//! Recipients, and the ways to reach them.
//!
//! They come from the policy and stand in the cluster's configuration as one `<alert>` with its `<recipient>`s:
//! `understudy-crm` writes their attributes ([`Recipient::attributes`], [`Delivery::attributes`]), Pacemaker hands them to the alert
//! agent in its environment, and whoever wants to tell something reads them from there. One list of names, both ways.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::alarm::Severity;
use crate::approval::Unanswered;

/// How an alarm reaches its recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Mail to an address.
    Mail,
    /// A short message to a telephone number.
    Sms,
    /// An HTTP POST.
    Webhook,
    /// A command.
    Command,
}

/// Who is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipient {
    /// The recipient's name.
    pub name: String,
    /// By what.
    pub kind: Kind,
    /// Address, number, URL or absolute path.
    pub to: String,
    /// Whether he may answer questions.
    pub approves: bool,
    /// He is told what is at least as bad.
    pub severity: Severity,
    /// Alarms with the same key within so many seconds are told once; 0 tells each.
    pub window: u64,
}

/// TLS on the way to the mail server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    /// None: for a server on the node itself.
    None,
    /// STARTTLS (RFC 3207), required. Port 587 unless said otherwise.
    Starttls,
    /// From the first byte (RFC 8314). Port 465 unless said otherwise.
    Implicit,
}

/// The ways to all recipients.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Delivery {
    /// To mail addresses.
    pub mail: Mail,
    /// To telephones.
    pub sms: Sms,
    /// To webhooks.
    pub hook: Hook,
}

/// The mail server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mail {
    /// Its name, as its certificate has it.
    pub server: String,
    /// Its port, if not the one of `tls`.
    pub port: Option<u16>,
    /// TLS.
    pub tls: Tls,
    /// Who logs in.
    pub user: Option<String>,
    /// File with the password, one line.
    pub password_file: Option<PathBuf>,
    /// Certificates (PEM) that the server's must come from; without it those that the host trusts.
    pub ca_file: Option<PathBuf>,
    /// The sender's address; `understudy@` and the node's name if not given.
    pub from: Option<String>,
    /// Where answers go.
    pub reply_to: Option<String>,
}

/// The mail server of the node itself.
impl Default for Mail {
    fn default() -> Self {
        let server = "localhost".into();
        let (port, user, password_file, ca_file, from, reply_to) = (None, None, None, None, None, None);
        Self { server, port, tls: Tls::None, user, password_file, ca_file, from, reply_to }
    }
}

/// The way to telephones: one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sms {
    /// A command: number as its argument, text on its standard input.
    pub command: Option<PathBuf>,
    /// A gateway: POST of `{"to": …, "text": …}`.
    pub url: Option<String>,
}

/// What hooks, and the gateway's URL, need.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hook {
    /// Certificates (PEM) that the server's must come from; without it those that the host trusts.
    pub ca_file: Option<PathBuf>,
    /// File with a token, one line: sent as `Authorization: Bearer TOKEN`.
    pub token_file: Option<PathBuf>,
}

/// What semi-automatic evacuation does with answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Approval {
    /// Seconds that a question stands.
    pub expires: u64,
    /// What happens when nobody answered by then.
    pub unanswered: Unanswered,
}

impl Default for Approval {
    fn default() -> Self {
        Self { expires: 900, unanswered: Unanswered::Refuse }
    }
}

/// Everything that the cluster's configuration says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Who is told.
    pub recipients: Vec<Recipient>,
    /// How.
    pub delivery: Delivery,
    /// What becomes of questions.
    pub approval: Approval,
}

/// An attribute that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the alert's attribute {name} is {value:?}: {form} is needed; run `understudy-crm apply` with the policy again"
)]
pub struct BadAttribute {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What would be right.
    pub form: &'static str,
}

type Pairs = Vec<(String, String)>;

fn word<T: Serialize>(value: &T) -> String {
    // The enums of this page are words in JSON.
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn enumerated<T: for<'de> Deserialize<'de>>(
    get: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
    form: &'static str,
) -> Result<Option<T>, BadAttribute> {
    let Some(value) = get(name) else { return Ok(None) };
    let read = serde_json::from_value(serde_json::Value::String(value.clone()));
    read.map(Some).map_err(|_| BadAttribute { name, value, form })
}

fn number<T: std::str::FromStr>(
    get: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
) -> Result<Option<T>, BadAttribute> {
    let Some(value) = get(name) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| BadAttribute { name, value, form: "a number in range" })
}

const SEVERITIES: &str = "info, warning or critical";

impl Recipient {
    /// As the recipient's attributes; `to` is its value.
    pub fn attributes(&self) -> Pairs {
        let Self { name, kind, to: _, approves, severity, window } = self;
        vec![
            ("name".into(), name.clone()),
            ("kind".into(), word(kind)),
            ("approves".into(), approves.to_string()),
            ("severity".into(), word(severity)),
            ("window".into(), window.to_string()),
        ]
    }

    /// From its value and its attributes.
    pub fn read(to: &str, get: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadAttribute> {
        let kind = enumerated(get, "kind", "mail, sms, webhook or command")?;
        let kind =
            kind.ok_or(BadAttribute { name: "kind", value: String::new(), form: "mail, sms, webhook or command" })?;
        Ok(Self {
            name: get("name").unwrap_or_else(|| to.to_owned()),
            kind,
            to: to.to_owned(),
            approves: get("approves").as_deref() == Some("true"),
            severity: enumerated(get, "severity", SEVERITIES)?.unwrap_or(Severity::Warning),
            window: number(get, "window")?.unwrap_or(DEFAULT_WINDOW),
        })
    }
}

/// Seconds within which the same alarm is told once, unless the recipient says otherwise.
pub const DEFAULT_WINDOW: u64 = 300;

impl Delivery {
    /// As the alert's attributes: only what is set.
    pub fn attributes(&self) -> Pairs {
        let Self { mail, sms, hook } = self;
        let Mail { server, port, tls, user, password_file, ca_file, from, reply_to } = mail;
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let all = [
            ("mail_server", Some(server.clone())),
            ("mail_port", port.map(|port| port.to_string())),
            ("mail_tls", Some(word(tls))),
            ("mail_user", user.clone()),
            ("mail_password_file", path(password_file)),
            ("mail_ca_file", path(ca_file)),
            ("mail_from", from.clone()),
            ("mail_reply_to", reply_to.clone()),
            ("sms_command", path(&sms.command)),
            ("sms_url", sms.url.clone()),
            ("hook_ca_file", path(&hook.ca_file)),
            ("hook_token_file", path(&hook.token_file)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }

    /// From them.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadAttribute> {
        let path = |name| get(name).map(PathBuf::from);
        let default = Mail::default();
        let mail = Mail {
            server: get("mail_server").unwrap_or(default.server),
            port: number(get, "mail_port")?,
            tls: enumerated(get, "mail_tls", "none, starttls or implicit")?.unwrap_or(default.tls),
            user: get("mail_user"),
            password_file: path("mail_password_file"),
            ca_file: path("mail_ca_file"),
            from: get("mail_from"),
            reply_to: get("mail_reply_to"),
        };
        let sms = Sms { command: path("sms_command"), url: get("sms_url") };
        let hook = Hook { ca_file: path("hook_ca_file"), token_file: path("hook_token_file") };
        Ok(Self { mail, sms, hook })
    }
}

impl Approval {
    /// As the alert's attributes.
    pub fn attributes(&self) -> Pairs {
        let Self { expires, unanswered } = self;
        vec![("approval_expires".into(), expires.to_string()), ("approval_unanswered".into(), word(unanswered))]
    }

    /// From them.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadAttribute> {
        let default = Self::default();
        Ok(Self {
            expires: number(get, "approval_expires")?.unwrap_or(default.expires),
            unanswered: enumerated(get, "approval_unanswered", "refuse or approve")?.unwrap_or(default.unanswered),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn getter(pairs: Pairs) -> impl Fn(&str) -> Option<String> {
        move |name| pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    #[test]
    fn attributes_are_read_back() {
        let recipient = Recipient {
            name: "night-shift".into(),
            kind: Kind::Sms,
            to: "+4930123456".into(),
            approves: true,
            severity: Severity::Critical,
            window: 60,
        };
        assert_eq!(Recipient::read("+4930123456", &getter(recipient.attributes())).unwrap(), recipient);
        let delivery = Delivery {
            mail: Mail {
                server: "mail.example".into(),
                port: Some(2525),
                tls: Tls::Starttls,
                user: Some("u".into()),
                password_file: Some("/etc/p".into()),
                ca_file: Some("/etc/ca".into()),
                from: Some("a@b".into()),
                reply_to: Some("c@d".into()),
            },
            sms: Sms { command: Some("/bin/sms".into()), url: Some("https://sms".into()) },
            hook: Hook { ca_file: Some("/etc/ca2".into()), token_file: Some("/etc/t".into()) },
        };
        assert_eq!(Delivery::read(&getter(delivery.attributes())).unwrap(), delivery);
        assert_eq!(Delivery::read(&getter(Vec::new())).unwrap(), Delivery::default());
        let approval = Approval { expires: 60, unanswered: Unanswered::Approve };
        assert_eq!(Approval::read(&getter(approval.attributes())).unwrap(), approval);
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let wrong = getter(vec![("kind".into(), "pigeon".into())]);
        let error = Recipient::read("x", &wrong).unwrap_err().to_string();
        assert!(error.contains("kind is \"pigeon\": mail, sms, webhook or command is needed"), "{error}");
        assert!(Delivery::read(&getter(vec![("mail_port".into(), "70000".into())])).is_err());
    }
}
