//! Alerts and approval: whether everybody can be reached, and somebody may answer.

use super::{Checker, Severity};
use crate::alerts::Tls;
use crate::estate::{AlertKind, Automation};
use crate::policy::{Policy, Spanned};

/// All of it.
pub fn check(c: &mut Checker, policy: &Policy) {
    for alert in &policy.alerts {
        let to = alert.to.get_ref();
        let (good, form) = match alert.kind {
            AlertKind::Mail => (is_address(to), "NAME@HOST"),
            AlertKind::Sms => (
                to.len() > 3 && to.strip_prefix('+').unwrap_or(to).chars().all(|d| d.is_ascii_digit()),
                "a number such as +4930123456",
            ),
            AlertKind::Webhook => (is_url(to), "https://HOST/PATH"),
            AlertKind::Command => (to.starts_with('/'), "an absolute path"),
        };
        if !good || to.contains(char::is_whitespace) {
            c.error(&alert.to, format!("{to:?} is not where a {:?} goes: write {form}", alert.kind).to_lowercase());
        }
        c.label("alert's name", &alert.name);
    }
    for (i, alert) in policy.alerts.iter().enumerate() {
        if policy.alerts[..i].iter().any(|before| before.name == alert.name) {
            c.error(
                &alert.name,
                format!("there are two alerts named {}: answers are told apart by it", alert.name.get_ref()),
            );
        }
    }
    ways(c, policy);
    if let Some(approval) = &policy.approval {
        if approval.expires.0 == 0 {
            c.whole(Severity::Error, "[approval] expires must not be 0: nobody could answer".to_owned());
        }
        if !policy.alerts.iter().any(|alert| alert.approves) {
            let what = "[approval], and nobody is asked: no [[alerts]] has approves = true; only `understudy-crm approve` on a node can \
                answer"
                .to_owned();
            c.whole(Severity::Warning, what);
        }
    } else if let Some(semi) = asks(policy)
        && policy.alerts.iter().any(|alert| alert.approves)
    {
        c.note(semi, "there is no [approval]: a question stands for 15 minutes, and unanswered it is refused");
    }
}

fn asks(policy: &Policy) -> Option<&Spanned<Automation>> {
    let of_machines = policy.machines.iter().filter_map(|m| m.automation.as_ref());
    policy.cluster.automation.iter().chain(of_machines).find(|a| *a.get_ref() == Automation::Semi)
}

fn is_address(text: &str) -> bool {
    text.split_once('@').is_some_and(|(name, host)| !name.is_empty() && !host.is_empty())
}

fn is_url(text: &str) -> bool {
    text.starts_with("https://") || text.starts_with("http://")
}

fn ways(c: &mut Checker, policy: &Policy) {
    let absolute = |c: &mut Checker, what: &str, file: &Option<Spanned<String>>| {
        if let Some(file) = file.as_ref().filter(|file| !file.get_ref().starts_with('/')) {
            c.error(file, format!("{what} must be an absolute path: it is opened on every node"));
        }
    };
    match &policy.mail {
        Some(mail) => {
            absolute(c, "password_file", &mail.password_file);
            absolute(c, "ca_file", &mail.ca_file);
            for address in mail.from.iter().chain(&mail.reply_to) {
                if !is_address(address.get_ref()) {
                    c.error(address, format!("{:?} is not a mail address: write NAME@HOST", address.get_ref()));
                }
            }
            match (&mail.user, &mail.password_file) {
                (Some(user), None) => c.error(user, "a user without a password: say password_file too"),
                (None, Some(file)) => c.error(file, "a password without a user: say user too"),
                (Some(user), Some(_)) if mail.tls == Tls::None => {
                    c.error(
                        user,
                        "tls = \"none\" and a password: it would be sent in the clear; use starttls or implicit",
                    );
                }
                _ => {}
            }
        }
        None => {
            if let Some(alert) = policy.alerts.iter().find(|alert| alert.kind == AlertKind::Mail) {
                c.note(
                    &alert.name,
                    "there is no [mail]: mails go to a mail server on each node itself (localhost, port 25)",
                );
            }
        }
    }
    let sms = policy.sms.clone().unwrap_or_default();
    absolute(c, "command", &sms.command);
    if let Some(url) = sms.url.as_ref().filter(|url| !is_url(url.get_ref())) {
        c.error(url, format!("{:?} is not a URL: write https://HOST/PATH", url.get_ref()));
    }
    match (&sms.command, &sms.url) {
        (Some(command), Some(_)) => c.error(command, "[sms] has command and url: say one of them"),
        (None, None) => {
            if let Some(alert) = policy.alerts.iter().find(|alert| alert.kind == AlertKind::Sms) {
                c.error(&alert.name, "there is no way to telephones: add [sms] with command or url");
            }
        }
        _ => {}
    }
    if let Some(hooks) = &policy.hooks {
        absolute(c, "ca_file", &hooks.ca_file);
        absolute(c, "token_file", &hooks.token_file);
    }
}
