//! Mail: SMTP (RFC 5321), with STARTTLS (RFC 3207) or TLS from the first byte (RFC 8314).

use std::time::Duration;

use lettre::message::header::{ContentType, HeaderName, HeaderValue};
use lettre::message::{Mailbox, Message};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, CertificateStore, Tls as How, TlsParameters};
use lettre::{SmtpTransport, Transport};

use super::{chain, pem, secret};
use crate::alarm::{Alarm, Sink, Trouble};
use crate::settings::{Mail as Settings, Tls};

/// The way to one address.
pub struct Mail<'a> {
    /// The address.
    pub to: &'a str,
    /// The server.
    pub settings: &'a Settings,
    /// For connecting and for each answer of the server.
    pub timeout: Duration,
}

impl Sink for Mail<'_> {
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble> {
        let message = self.message(alarm)?;
        let transport = self.transport()?;
        transport.send(&message).map(drop).map_err(|e| {
            let server = self.server();
            if e.is_permanent() {
                let text = format!("the mail server {server} does not take mail for {}: {}", self.to, chain(&e));
                return Trouble::lasting(text);
            }
            let hint = if e.is_tls() || chain(&e).contains("certificate") {
                " (is ca_file in [mail] of the policy the authority that signed the server's certificate, and is server the name in it?)"
            } else {
                ""
            };
            Trouble::passing(format!("cannot give a mail for {} to the mail server {server}: {}{hint}", self.to, chain(&e)))
        })
    }
}

impl Mail<'_> {
    fn port(&self) -> u16 {
        self.settings.port.unwrap_or(match self.settings.tls {
            Tls::None => 25,
            Tls::Starttls => 587,
            Tls::Implicit => 465,
        })
    }

    fn server(&self) -> String {
        format!("{}:{}", self.settings.server, self.port())
    }

    fn transport(&self) -> Result<SmtpTransport, Trouble> {
        let Settings { server, port: _, tls, user, password_file, ca_file, from: _, reply_to: _ } = self.settings;
        let how = match tls {
            Tls::None => How::None,
            Tls::Starttls | Tls::Implicit => {
                let mut parameters = TlsParameters::builder(server.clone());
                if let Some(file) = ca_file {
                    let bad = |e: &dyn std::error::Error| {
                        Trouble::passing(format!("{} holds no certificates in PEM form: {}", file.display(), chain(e)))
                    };
                    // Only those: a mail server of one's own is not vouched for by the whole world.
                    parameters = parameters.certificate_store(CertificateStore::None);
                    let certificate = Certificate::from_pem(&pem(file)?).map_err(|e| bad(&e))?;
                    parameters = parameters.add_root_certificate(certificate);
                }
                let parameters = parameters.build().map_err(|e| {
                    Trouble::passing(format!(
                        "TLS for the mail server {} cannot be set up: {}",
                        self.server(),
                        chain(&e)
                    ))
                })?;
                if *tls == Tls::Starttls { How::Required(parameters) } else { How::Wrapper(parameters) }
            }
        };
        let mut transport = SmtpTransport::builder_dangerous(server.as_str()).port(self.port()).tls(how);
        transport = transport.timeout(Some(self.timeout));
        match (user, password_file) {
            (Some(user), Some(file)) if *tls != Tls::None => {
                transport = transport.credentials(Credentials::new(user.clone(), secret(file, "mail password")?));
            }
            (Some(_), Some(_)) => {
                return Err(Trouble::passing(
                    "[mail] has a password and tls = \"none\": it is not sent in the clear; set tls",
                ));
            }
            _ => {}
        }
        Ok(transport.build())
    }

    fn message(&self, alarm: &Alarm) -> Result<Message, Trouble> {
        let address = |text: &str| {
            let parsed = text.parse::<Mailbox>();
            parsed.map_err(|e| {
                Trouble::lasting(format!("{text:?} is not a mail address ({e}): correct it in the policy"))
            })
        };
        let from = match &self.settings.from {
            Some(from) => from.clone(),
            None => format!("understudy@{}", crate::node_name()),
        };
        let priority = if alarm.severity == crate::alarm::Severity::Critical { "1" } else { "3" };
        let header =
            |name: &'static str, value: &str| HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned());
        let mut message = Message::builder().from(address(&from)?).to(address(self.to)?).subject(&alarm.subject);
        if let Some(reply_to) = &self.settings.reply_to {
            message = message.reply_to(address(reply_to)?);
        }
        // RFC 3834: no vacation program shall answer.
        message =
            message.raw_header(header("Auto-Submitted", "auto-generated")).raw_header(header("X-Priority", priority));
        let mut body = if alarm.text.is_empty() { alarm.subject.clone() } else { alarm.text.clone() };
        body.push_str("\n\n-- \n");
        for (name, value) in [("machine", &alarm.machine), ("node", &alarm.node)] {
            if let Some(value) = value {
                body.push_str(&format!("{name}: {value}\n"));
            }
        }
        body.push_str(&format!("severity: {}\nfrom: understudy on {}\n", alarm.severity.as_str(), crate::node_name()));
        message = message.header(ContentType::TEXT_PLAIN).message_id(None);
        message.body(body).map_err(|e| Trouble::lasting(format!("the mail cannot be written: {}", chain(&e))))
    }
}
