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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::Role;
    use crate::parameter::Param;

    static NAME: Param<String> =
        Param::text("name").required().unique_group("id").short("A <name>").long("Say \"who\" & what.");
    static MODE: Param<String> =
        Param::choice("mode", &["a", "b"]).default("a").reloadable().short("Mode").long("How.");

    #[test]
    fn the_document_is_this() {
        let description = Description {
            name: "example",
            version: "1.0",
            short: "Example",
            long: "An example.",
            parameters: vec![NAME.declaration(), MODE.declaration()],
            actions: vec![
                ActionSpec::new(Action::Start, "20s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s").in_role(Role::Promoted).at_depth(10),
                ActionSpec::new(Action::ReloadAgent, "10s"),
            ],
        };
        assert_eq!(
            document(&description),
            r#"<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd" [
<!ATTLIST parameter unique-group CDATA #IMPLIED reloadable CDATA #IMPLIED>
<!ATTLIST action name CDATA #REQUIRED>
]>
<resource-agent name="example" version="1.0">
  <version>1.1</version>
  <longdesc lang="en">An example.</longdesc>
  <shortdesc lang="en">Example</shortdesc>
  <parameters>
    <parameter name="name" unique-group="id" required="1">
      <longdesc lang="en">Say &quot;who&quot; &amp; what.</longdesc>
      <shortdesc lang="en">A &lt;name&gt;</shortdesc>
      <content type="string"/>
    </parameter>
    <parameter name="mode" required="0" reloadable="1">
      <longdesc lang="en">How. One of: a, b.</longdesc>
      <shortdesc lang="en">Mode</shortdesc>
      <content type="string" default="a"/>
    </parameter>
  </parameters>
  <actions>
    <action name="start" timeout="20s"/>
    <action name="monitor" timeout="20s" interval="10s" role="Promoted" depth="10"/>
    <action name="reload-agent" timeout="10s"/>
    <action name="validate-all" timeout="10s"/>
    <action name="meta-data" timeout="5s"/>
  </actions>
</resource-agent>
"#
        );
    }
}
