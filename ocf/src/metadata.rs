//! The metadata document.
//!
//! Three readers have three ideas of it: `ocf-tester` validates against `ra-api-1.dtd` (which knows OCF 1.0 only), pcs against
//! an OCF 1.1 RELAX NG schema, `crm` and Pacemaker parse it leniently. An *internal subset* satisfies all of them: in XML the
//! first ATTLIST for an attribute wins, so ours widens the external DTD by `unique-group`, `reloadable` and the action
//! `reload-agent`. (Elements cannot be widened that way: `<deprecated>` and `<option>` are not used.)

use std::io;

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event};

use crate::action::{Action, ActionSpec};
use crate::agent::Description;
use crate::parameter::{Declaration, Kind};

const DOCTYPE: &str = "resource-agent SYSTEM \"ra-api-1.dtd\" [\n\
    <!ATTLIST parameter unique-group CDATA #IMPLIED reloadable CDATA #IMPLIED>\n\
    <!ATTLIST action name CDATA #REQUIRED>\n]";

/// The document that `meta-data` prints.
pub fn document(description: &Description) -> String {
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
    // Writing to memory does not fail; were it to, an empty document is refused by every reader.
    match write(&mut writer, description) {
        Ok(()) => String::from_utf8(writer.into_inner()).map(|text| text + "\n").unwrap_or_default(),
        Err(_) => String::new(),
    }
}

type Xml = Writer<Vec<u8>>;

fn write(xml: &mut Xml, d: &Description) -> io::Result<()> {
    // No encoding: UTF-8 is the default, and crmsh hands the text to a parser that refuses a declared one.
    xml.write_event(Event::Decl(BytesDecl::new("1.0", None, None)))?;
    xml.write_event(Event::DocType(BytesText::from_escaped(DOCTYPE)))?;
    let root = BytesStart::new("resource-agent").with_attributes([("name", d.name), ("version", d.version)]);
    xml.write_event(Event::Start(root))?;
    xml.create_element("version").write_text_content(BytesText::new("1.1"))?;
    texts(xml, d.long, d.short)?;
    xml.write_event(Event::Start(BytesStart::new("parameters")))?;
    for parameter in &d.parameters {
        write_parameter(xml, parameter)?;
    }
    xml.write_event(Event::End(BytesEnd::new("parameters")))?;
    xml.write_event(Event::Start(BytesStart::new("actions")))?;
    for spec in all_actions(d) {
        write_action(xml, &spec)?;
    }
    xml.write_event(Event::End(BytesEnd::new("actions")))?;
    xml.write_event(Event::End(BytesEnd::new("resource-agent")))
}

/// The agent's actions and the two that every agent has.
fn all_actions(d: &Description) -> Vec<ActionSpec> {
    let mut specs = d.actions.clone();
    for (action, timeout) in [(Action::ValidateAll, "10s"), (Action::MetaData, "5s")] {
        if !specs.iter().any(|s| s.action == action) {
            specs.push(ActionSpec::new(action, timeout));
        }
    }
    specs
}

fn texts(xml: &mut Xml, long: &str, short: &str) -> io::Result<()> {
    for (element, text) in [("longdesc", long), ("shortdesc", short)] {
        xml.create_element(element).with_attribute(("lang", "en")).write_text_content(BytesText::new(text))?;
    }
    Ok(())
}

fn write_parameter(xml: &mut Xml, p: &Declaration) -> io::Result<()> {
    let mut element = BytesStart::new("parameter").with_attributes([("name", p.name)]);
    if let Some(group) = p.unique_group {
        element.push_attribute(("unique-group", group));
    }
    element.push_attribute(("required", if p.required { "1" } else { "0" }));
    if p.reloadable {
        element.push_attribute(("reloadable", "1"));
    }
    xml.write_event(Event::Start(element))?;
    match p.kind {
        Kind::Choice(words) => texts(xml, &format!("{} One of: {}.", p.long, words.join(", ")), p.short)?,
        _ => texts(xml, p.long, p.short)?,
    }
    let mut content = BytesStart::new("content").with_attributes([("type", p.kind.content_type())]);
    if let Some(default) = p.default {
        content.push_attribute(("default", default));
    }
    xml.write_event(Event::Empty(content))?;
    xml.write_event(Event::End(BytesEnd::new("parameter")))
}

fn write_action(xml: &mut Xml, spec: &ActionSpec) -> io::Result<()> {
    let mut element =
        BytesStart::new("action").with_attributes([("name", spec.action.name()), ("timeout", spec.timeout)]);
    if let Some(interval) = spec.interval {
        element.push_attribute(("interval", interval));
    }
    if let Some(role) = spec.role {
        element.push_attribute(("role", role.name()));
    }
    if let Some(depth) = spec.depth {
        element.push_attribute(("depth", depth.to_string().as_str()));
    }
    xml.write_event(Event::Empty(element))
}
