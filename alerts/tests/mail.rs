//! Mail, by a real mail server with TLS and a password: alarms, a server that is away, a question and its answer.

mod support;

use std::cell::RefCell;
use std::fs;
use std::time::Duration;

use mail_parser::MessageParser;
use support::Exim;
use understudy_alerts::alarm::{Alarm, Severity, Sink, Trouble};
use understudy_alerts::answering;
use understudy_alerts::approval::{Answer, Given, Record, Request, Way, digest};
use understudy_alerts::cluster::{ClusterError, Records};
use understudy_alerts::deliver::{self, Mail};
use understudy_alerts::outbox::Outbox;
use understudy_alerts::reply;
use understudy_alerts::sender::{self, Turn, World};
use understudy_alerts::settings::{Delivery, Kind, Mail as Settings, Recipient, Settings as All, Tls};
use understudy_alerts::spool::{Item, Spool};
use understudy_protocol::key::Key;

const TIMEOUT: Duration = Duration::from_secs(20);

fn alarm() -> Alarm {
    let text = "Web1 läuft nicht.\n.\nA line with a dot alone stands above.";
    Alarm::new(Severity::Critical, "Maschine web1 fehlt – größte Not", text).machine("web1").node("n1")
}

fn send(settings: &Settings, to: &str) -> Result<(), Trouble> {
    Mail { to, settings, timeout: TIMEOUT }.tell(&alarm())
}

#[test]
fn a_mail_arrives_with_starttls_and_with_tls_from_the_first_byte() {
    let Some(exim) = Exim::started() else { return };
    for tls in [Tls::Starttls, Tls::Implicit] {
        send(&exim.settings(tls), "night@works.example").unwrap();
    }
    for mail in exim.mails(2) {
        let mail = MessageParser::default().parse(&mail).unwrap();
        assert_eq!(mail.subject(), Some("Maschine web1 fehlt – größte Not"));
        let text = mail.body_text(0).unwrap().replace("\r\n", "\n");
        assert!(text.starts_with(&alarm().text), "{text}");
        assert!(text.contains("\n-- \nmachine: web1\nnode: n1\nseverity: critical\n"), "{text}");
        assert_eq!(mail.header_raw("Auto-Submitted").map(str::trim), Some("auto-generated"));
        assert!(mail.message_id().is_some() && mail.date().is_some());
        // What we send is not taken for somebody's answer.
        assert!(reply::from_mail(mail.raw_message()).is_err());
    }
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_sent_in_the_clear() {
    let Some(exim) = Exim::started() else { return };
    let good = exim.settings(Tls::Starttls);
    let lasting = |settings: &Settings, to: &str| {
        let trouble = send(settings, to).unwrap_err();
        (trouble.lasting, trouble.text)
    };
    let (last, text) = lasting(&good, "somebody@elsewhere.example");
    assert!(last && text.contains("does not take mail for somebody@elsewhere.example"), "{text}");
    let (_, text) = lasting(&Settings { ca_file: None, ..good.clone() }, "night@works.example");
    assert!(text.contains("is ca_file in [mail] of the policy"), "{text}");
    let (last, text) =
        lasting(&Settings { password_file: Some("/nowhere".into()), ..good.clone() }, "night@works.example");
    assert!(!last && text.contains("cannot read the mail password in /nowhere"), "{text}");
    fs::write(exim.path("wrong"), "not this\n").unwrap();
    let wrong = Settings { password_file: Some(exim.path("wrong")), ..good.clone() };
    assert!(send(&wrong, "night@works.example").unwrap_err().text.contains("535"));
    let (_, text) = lasting(&Settings { tls: Tls::None, ..good.clone() }, "night@works.example");
    assert!(text.contains("not sent in the clear"), "{text}");
    let (last, text) = lasting(&good, "no address");
    assert!(last && text.contains("is not a mail address"), "{text}");
    let closed = Settings { port: Some(1), ..good };
    let (last, text) = lasting(&closed, "night@works.example");
    assert!(!last && text.contains("the mail server localhost:1"), "{text}");
}

/// A sender with a clock of its own; during its first pause the mail server is started.
struct Late {
    exim: RefCell<Exim>,
    now: RefCell<u64>,
    pauses: RefCell<u32>,
}

impl World for Late {
    fn now(&self) -> u64 {
        *self.now.borrow()
    }
    fn pause(&self, at_most: Duration) {
        *self.now.borrow_mut() += at_most.as_secs();
        *self.pauses.borrow_mut() += 1;
        if *self.pauses.borrow() == 1 {
            self.exim.borrow_mut().start();
        }
    }
    fn turn(&self) -> Turn {
        Turn::Ours
    }
    fn current(&self, _: &Recipient) -> Option<(Recipient, Delivery)> {
        None
    }
    fn tell(&self, item: &Item) -> Result<(), Trouble> {
        deliver::sink(&item.recipient, &item.delivery, TIMEOUT).tell(&item.alarm)
    }
}

fn night() -> Recipient {
    Recipient {
        name: "night".into(),
        kind: Kind::Mail,
        to: "night@works.example".into(),
        approves: true,
        severity: Severity::Warning,
        window: 300,
    }
}

#[test]
fn an_alarm_outlives_a_mail_server_that_is_away() {
    let Some(exim) = Exim::prepare() else { return };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path().join("alerts")).unwrap();
    let delivery = Delivery { mail: exim.settings(Tls::Starttls), ..Delivery::default() };
    for subject in ["one", "two"] {
        let alarm = Alarm::new(Severity::Warning, subject, "");
        spool
            .take(Item {
                at: 1000,
                alarm,
                recipient: night(),
                delivery: delivery.clone(),
                everywhere: false,
                tries: 0,
                next: 0,
            })
            .unwrap();
    }
    let world = Late { exim: exim.into(), now: 1000.into(), pauses: 0.into() };
    sender::run(&spool, &world).unwrap();
    assert!(spool.names().unwrap().is_empty());
    assert_eq!(world.exim.borrow().mails(2).len(), 2);
    let journal = fs::read_to_string(spool.journal().path()).unwrap();
    assert!(journal.contains("cannot give a mail for night@works.example to the mail server localhost:"), "{journal}");
}

/// The cluster, with one question.
#[derive(Default)]
struct One(RefCell<Option<Record>>);

impl Records for One {
    fn get(&self, _: &str) -> Result<Option<Record>, ClusterError> {
        Ok(self.0.borrow().clone())
    }
    fn all(&self) -> Result<Vec<Record>, ClusterError> {
        Ok(self.0.borrow().iter().cloned().collect())
    }
    fn put(&self, record: &Record, _: Option<u32>) -> Result<bool, ClusterError> {
        *self.0.borrow_mut() = Some(record.clone());
        Ok(true)
    }
    fn remove(&self, _: &Record) -> Result<(), ClusterError> {
        Ok(())
    }
}

#[test]
fn a_question_is_asked_by_mail_and_answered_by_mail() {
    let Some(exim) = Exim::prepare() else { return };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path().join("alerts")).unwrap();
    let delivery = Delivery { mail: exim.settings(Tls::Implicit), ..Delivery::default() };
    let settings = All { recipients: vec![night()], delivery, ..All::default() };
    let outbox = Outbox::new(spool.clone(), settings, None);
    let (cluster, key) = (One::default(), Key::from_bytes([9; 32], "test"));
    let summary = "n1 is lost. 2 machines would be started elsewhere:\n  web1 on n2\n  web2 on n3".to_owned();
    let request =
        Request { id: "n1-17".into(), plan: digest(&summary), summary, asked: 0, expires: 0, approvers: vec![] };
    answering::ask_all(&outbox, &cluster, &key, request).unwrap();
    let world = Late { exim: exim.into(), now: understudy_alerts::now().into(), pauses: 0.into() };
    sender::run(&spool, &world).unwrap();

    // Somebody reads it and answers, as mail programs do.
    let mail = world.exim.borrow().mails(1).remove(0);
    let mail = MessageParser::default().parse(&mail).unwrap();
    let text = mail.body_text(0).unwrap().into_owned();
    assert!(text.contains("web2 on n3"), "{text}");
    let line = text.lines().map(str::trim).find(|line| line.starts_with("APPROVE ")).unwrap();
    let quoted: String = text.lines().map(|line| format!("> {line}\r\n")).collect();
    let answer = format!(
        "From: Night <night@works.example>\r\nTo: answers@works.example\r\nSubject: Re: {}\r\nIn-Reply-To: <{}>\r\n\
         Content-Type: text/plain; charset=utf-8\r\n\r\n{line}\r\n\r\nOn Monday understudy wrote:\r\n{quoted}",
        mail.subject().unwrap(),
        mail.message_id().unwrap(),
    );
    let reply = reply::from_mail(answer.as_bytes()).unwrap();
    let given = Given { answer: reply.answer, code: &reply.code, name: None, way: Way::Mail };
    let now = understudy_alerts::now();
    let take = || answering::answer(&cluster, &key, &reply.id, &given, now, &|line| spool.note(line));
    let decision = take().unwrap();
    assert_eq!((decision.answer, decision.by.as_str()), (Answer::Approve, "night"));
    assert!(take().unwrap_err().to_string().contains("a code counts once"));
    let journal = fs::read_to_string(spool.journal().path()).unwrap();
    let what: Vec<_> =
        journal.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["what"].clone()).collect();
    assert_eq!(
        what.iter().filter(|what| *what != "failed").collect::<Vec<_>>(),
        ["queued", "asked", "told", "decided", "refused"]
    );
    // The code is in the mail and nowhere else.
    assert!(!journal.contains(&reply.code), "{journal}");
}
