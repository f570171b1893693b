//! `[[alerts]]`, `[mail]`, `[sms]`, `[hooks]` and `[approval]`: who is told and how, as Pacemaker's `<alerts>`.
//!
//! One `<alert>` with the alert agent and all that it must know to reach people, one `<recipient>` for each `[[alerts]]`. The names of
//! the attributes are `understudy_alerts::settings`'s: the agent reads them from its environment, others from the configuration.
//! Nothing secret is among them: passwords and tokens are in files on the nodes.

use schemars::JsonSchema;
use serde::Deserialize;
use understudy_alerts::settings as to;

use crate::estate::{AlertKind, Unanswered};
use crate::model::Pair;
use crate::policy::{Policy, Seconds, Spanned};

/// Where `make install` puts the agent.
pub const AGENT: &str = "/usr/libexec/understudy/understudy-alert";
/// Id of our `<alert>`.
pub use understudy_alerts::cluster::ALERT;

/// How bad an alarm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know: a resource was started, a node came back.
    Info,
    /// Something failed, or a node was fenced.
    #[default]
    Warning,
    /// A node is lost or cannot be fenced, a machine cannot be placed, somebody is asked.
    Critical,
}

/// TLS on the way to the mail server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    /// STARTTLS, required; port 587.
    #[default]
    Starttls,
    /// TLS from the first byte; port 465.
    Implicit,
    /// None; port 25. For a server on the node itself; no password is sent.
    None,
}

/// `[mail]`: the mail server. Without it, mails go to the one on the node itself (port 25, no TLS).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mail {
    /// Its name, as its certificate has it.
    pub server: Spanned<String>,
    /// Its port, if not the usual one.
    pub port: Option<u16>,
    /// TLS.
    #[serde(default)]
    pub tls: Tls,
    /// Who logs in.
    pub user: Option<Spanned<String>>,
    /// File with the password, one line, on every node, readable by the user hacluster.
    pub password_file: Option<Spanned<String>>,
    /// Certificates (PEM) that the server's must come from; without it those that the host trusts.
    pub ca_file: Option<Spanned<String>>,
    /// The sender's address; `understudy@` and the node's name if not given.
    pub from: Option<Spanned<String>>,
    /// Where answers to questions go; see docs/alerts.md.
    pub reply_to: Option<Spanned<String>>,
}

/// `[sms]`: the way to telephones, one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sms {
    /// A command on every node: the number is its argument, the text its standard input.
    pub command: Option<Spanned<String>>,
    /// A gateway: POST of `{"to": …, "text": …}`.
    pub url: Option<Spanned<String>>,
}

/// `[hooks]`: what webhooks and the SMS gateway's URL need.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hooks {
    /// Certificates (PEM) that the server's must come from; without it those that the host trusts.
    pub ca_file: Option<Spanned<String>>,
    /// File with a token, one line, on every node, readable by hacluster: sent as `Authorization: Bearer`.
    pub token_file: Option<Spanned<String>>,
}

/// The default of `window`.
pub(crate) fn default_window() -> Seconds {
    Seconds(to::DEFAULT_WINDOW)
}

/// `<alert>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alert {
    /// What the agent is told whoever the recipient is.
    pub attributes: Vec<Pair>,
    /// Who is told.
    pub recipients: Vec<Recipient>,
}

/// `<recipient>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipient {
    /// Its id.
    pub id: String,
    /// Address, number, URL or path.
    pub value: String,
    /// What the agent is told of it.
    pub attributes: Vec<Pair>,
}

/// What a policy says of alerts; `None` if it says nothing.
pub fn compile(policy: &Policy) -> Option<Alert> {
    if policy.alerts.is_empty() && policy.approval.is_none() {
        return None;
    }
    let mut attributes = delivery(policy).attributes();
    if let Some(approval) = &policy.approval {
        let unanswered = match approval.unanswered {
            Unanswered::Refuse => understudy_alerts::approval::Unanswered::Refuse,
            Unanswered::Approve => understudy_alerts::approval::Unanswered::Approve,
        };
        attributes.extend(to::Approval { expires: approval.expires.0, unanswered }.attributes());
    }
    let recipients = policy.alerts.iter().map(|alert| {
        let recipient = to::Recipient {
            name: alert.name.get_ref().clone(),
            kind: match alert.kind {
                AlertKind::Mail => to::Kind::Mail,
                AlertKind::Sms => to::Kind::Sms,
                AlertKind::Webhook => to::Kind::Webhook,
                AlertKind::Command => to::Kind::Command,
            },
            to: alert.to.get_ref().clone(),
            approves: alert.approves,
            severity: match alert.severity {
                Severity::Info => understudy_alerts::alarm::Severity::Info,
                Severity::Warning => understudy_alerts::alarm::Severity::Warning,
                Severity::Critical => understudy_alerts::alarm::Severity::Critical,
            },
            window: alert.window.0,
        };
        Recipient {
            id: format!("{ALERT}-{}", recipient.name),
            value: recipient.to.clone(),
            attributes: recipient.attributes(),
        }
    });
    Some(Alert { attributes, recipients: recipients.collect() })
}

fn delivery(policy: &Policy) -> to::Delivery {
    let text = |value: &Option<Spanned<String>>| value.as_ref().map(|value| value.get_ref().clone());
    let path = |value: &Option<Spanned<String>>| text(value).map(Into::into);
    let mail = policy.mail.as_ref().map(|mail| to::Mail {
        server: mail.server.get_ref().clone(),
        port: mail.port,
        tls: match mail.tls {
            Tls::Starttls => to::Tls::Starttls,
            Tls::Implicit => to::Tls::Implicit,
            Tls::None => to::Tls::None,
        },
        user: text(&mail.user),
        password_file: path(&mail.password_file),
        ca_file: path(&mail.ca_file),
        from: text(&mail.from),
        reply_to: text(&mail.reply_to),
    });
    let (sms, hooks) = (policy.sms.clone().unwrap_or_default(), policy.hooks.clone().unwrap_or_default());
    to::Delivery {
        mail: mail.unwrap_or_default(),
        sms: to::Sms { command: path(&sms.command), url: text(&sms.url) },
        hook: to::Hook { ca_file: path(&hooks.ca_file), token_file: path(&hooks.token_file) },
    }
}
